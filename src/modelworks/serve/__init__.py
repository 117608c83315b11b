"""Serving: an OpenAI-compatible API and a chat in the terminal, over engines that answer.

Three ideas. **A store** (`serve.store`) holds models that can be served, each whole or absent. **An engine**
(`serve.engine`) turns a request into a stream of OpenAI chunks; `serve.llamacpp` is the one inside this process,
`serve.upstream` one elsewhere, `serve.routing` many as one. **The API** (`serve.api`) checks what comes in, hands it to
the engine, and passes the chunks on as they are. Who may ask, and who is next, is between the two: `serve.access`,
`serve.gate`, `serve.fairness`.

What other rooms use (import from the modules; this package itself is light)::

    from modelworks.serve.store import Store
    from modelworks.serve.llamacpp import EngineSettings, LlamaCppEngine
    from modelworks.serve.api import create_app

    store = Store()                                    # models_folder(); list() get() add() remove() pull()
    store.pull("smollm2-135m", progress)               # progress(done_bytes, total_bytes); blocking: use a thread
    engine = LlamaCppEngine(store, EngineSettings(slots=4, threads=1))
    app = create_app(engine, store)                    # FastAPI: /v1/*, /health, /metrics; "/" is left for the pages
                                                       # (ui.run_with(app, mount_path="/")); closes the engine at exit

    async with contextlib.aclosing(engine.chat("smollm2-135m", messages, temperature=0.7, max_tokens=512)) as answer:
        async for delta in answer:
            delta.text                                 # a piece of the answer, possibly of several tokens
            delta.finish_reason                        # None until the end, then "stop", "length" or "tool_calls"
            delta.usage                                # on the last one: prompt_tokens, completion_tokens

Closing the iterator (or cancelling the task that reads it) stops the answer and frees its slot at once. Failures are
`serve.errors.RequestError` (what was asked can't be answered; it has `status` and `code`) or `OperationError`.
"""
