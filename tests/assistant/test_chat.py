"""One answer's flow, with the real engine and SmolLM2: stored while it is written, stopped, refused, trimmed."""

import asyncio

import pytest

from modelworks.assistant.chat import PERSONA, Assistant, fit
from modelworks.assistant.store import ConversationStore
from modelworks.serve.errors import RequestError
from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
from modelworks.serve.store import Store
from modelworks.spec.errors import InputError, OperationError

MODEL = "smollm2-135m"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Store:
    store = Store(tmp_path_factory.mktemp("models"))
    try:
        store.pull(MODEL)
    except OperationError as error:
        pytest.skip(f"SmolLM2 can't be fetched here: {error}")
    return store


@pytest.fixture
async def assistant(models, tmp_path):
    engine = LlamaCppEngine(models, EngineSettings(slots=1, threads=1, context=512))
    store = ConversationStore(tmp_path / "modelworks.db")
    assistant = Assistant(store, engine, {"temperature": 0, "max_tokens": 200})
    yield assistant
    await assistant.close()
    await engine.close()
    store.close()


async def test_an_answer_is_what_the_engine_says_and_is_stored_with_its_question(assistant):
    conversation = assistant.store.create(MODEL)
    answer = await assistant.ask(conversation.id, "Say hello.", None, MODEL)
    await answer.finished.wait()
    said = ""
    messages = [PERSONA, {"role": "user", "content": "Say hello."}]
    async for delta in assistant.engine.chat(MODEL, messages, temperature=0, max_tokens=200):
        said += delta.text
    question, stored = assistant.store.thread(conversation.id)
    assert (question.content, stored.content, stored.state, stored.model) == ("Say hello.", said, "complete", MODEL)


async def test_a_stopped_answer_keeps_what_was_said_and_the_next_can_begin(assistant):
    conversation = assistant.store.create(MODEL)
    answer = await assistant.ask(conversation.id, "Count from one to five hundred.", None, MODEL)
    while len(answer.text) < 10:
        await asyncio.sleep(0.02)
    with pytest.raises(InputError, match="still being written"):
        await assistant.ask(conversation.id, "And now?", answer.message.id, MODEL)
    await assistant.stop(conversation.id)
    stored = assistant.store.thread(conversation.id)[-1]
    assert stored.state == "stopped"
    assert stored.content == answer.text
    assert assistant.running(conversation.id) is None
    again = await assistant.answer(conversation.id, stored.parent_id, MODEL)
    await assistant.stop(conversation.id)
    assert assistant.store.thread(conversation.id)[-1].versions == (stored.id, again.message.id)


async def test_an_answer_that_was_cut_short_goes_on_as_if_it_had_not_been(assistant):
    async def grown(answer, length):
        while len(answer.text) < length:
            await asyncio.sleep(0.01)
        await assistant.stop(answer.message.conversation_id)
        return answer.text

    question = "Tell me about the sea."
    whole = await grown(await assistant.ask(assistant.store.create(MODEL).id, question, None, MODEL), 160)
    conversation = assistant.store.create(MODEL)
    cut = await grown(answer := await assistant.ask(conversation.id, question, None, MODEL), 60)
    assert whole.startswith(cut)
    again = await assistant.resume(conversation.id, answer.message.id)
    assert await assistant.resume(conversation.id, answer.message.id) is again
    text = await grown(again, len(cut) + 40)
    assert text[: len(cut) + 40] == whole[: len(cut) + 40]
    stored = assistant.store.thread(conversation.id)[-1]
    assert (stored.id, stored.content) == (answer.message.id, text)


async def test_an_unknown_model_fails_the_answer_and_keeps_the_question(assistant):
    conversation = assistant.store.create(MODEL)
    answer = await assistant.ask(conversation.id, "Anyone there?", None, "no-such-model")
    await answer.finished.wait()
    question, stored = assistant.store.thread(conversation.id)
    assert question.content == "Anyone there?"
    assert stored.state == "failed"
    assert "no-such-model" in stored.notice


async def test_an_empty_message_is_refused_and_nothing_is_stored(assistant):
    conversation = assistant.store.create(MODEL)
    with pytest.raises(InputError, match="empty"):
        await assistant.ask(conversation.id, " \n", None, MODEL)
    assert assistant.store.thread(conversation.id) == []


async def test_the_oldest_turns_are_left_out_of_a_long_talk_and_the_reader_is_told(assistant):
    conversation = assistant.store.create(MODEL)
    parent = None
    for number in range(12):
        question = assistant.store.add(conversation.id, "user", f"Fact {number}: " + "the sky is blue. " * 8, parent)
        parent = assistant.store.add(conversation.id, "assistant", "I see. " * 8, question.id, MODEL).id
    history = assistant.store.thread(conversation.id)
    turns, left_out = await fit(assistant.engine, MODEL, history)
    context = next(card.context for card in await assistant.engine.models() if card.name == MODEL)
    assert left_out + len(turns) == len(history)
    assert left_out > 0
    usage = [d.usage async for d in assistant.engine.chat(MODEL, turns, max_tokens=1) if d.usage][-1]
    assert usage.prompt_tokens < context
    assert turns[0]["role"] == "user"
    assert turns[-1]["content"] == history[-1].content

    answer = await assistant.ask(conversation.id, "What colour is the sky?", parent, MODEL)
    await answer.finished.wait()
    stored = assistant.store.thread(conversation.id)[-1]
    assert stored.state == "complete"
    assert "left out" in stored.notice


async def test_one_message_that_exceeds_the_context_fails_in_one_sentence(assistant):
    conversation = assistant.store.create(MODEL)
    answer = await assistant.ask(conversation.id, "word " * 5000, None, MODEL)
    await answer.finished.wait()
    stored = assistant.store.thread(conversation.id)[-1]
    assert stored.state == "failed"
    assert stored.notice
    with pytest.raises(RequestError):
        async for _ in assistant.engine.chat(MODEL, [{"role": "user", "content": "word " * 5000}]):
            pass


async def test_the_model_gives_a_title_in_the_background_and_never_over_a_persons(models, tmp_path):
    engine = LlamaCppEngine(models, EngineSettings(slots=1, threads=1, context=512))
    store = ConversationStore(tmp_path / "titled.db")
    assistant = Assistant(store, engine, {"temperature": 0, "max_tokens": 40}, titles=True)
    question = "What is the capital of France?"
    titles = []
    for given in (None, "Mine"):
        conversation = store.create(MODEL)
        if given:
            store.rename(conversation.id, given)
        answer = await assistant.ask(conversation.id, question, None, MODEL)
        await answer.finished.wait()
        assert assistant.titling(conversation.id)
        while assistant.titling(conversation.id):
            await asyncio.sleep(0.02)
        titles.append(store.conversation(conversation.id))
    await assistant.close()
    await engine.close()
    store.close()
    assert titles[0].title_by in {"line", "model"}
    assert (titles[0].title_by == "line") == (titles[0].title == question)
    assert 0 < len(titles[0].title.split()) <= 6
    assert (titles[1].title, titles[1].title_by) == ("Mine", "person")
