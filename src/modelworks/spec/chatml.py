"""ChatML, the way of writing dialogues out that models are given which come with none of their own."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of the models that we train: https://github.com/openai/openai-python/blob/v0.28.1/chatml.md"""
