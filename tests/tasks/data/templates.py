"""Chat templates with the traits of real ones, in few lines."""

# Phi-3.5: another token after the last turn only.
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# gpt-oss: the last answer ends with a token of its own, answers have a header, and earlier reasoning is dropped.
GPT_OSS = (
    "{% for m in messages %}"
    "{% if m['role'] != 'assistant' %}{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
# Command-A: two tokens end a turn; the generation prompt has part of the header.
COMMAND_A = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|TURN|><|BOT|><|RESPONSE|>' + m['content'] + '<|/RESPONSE|><|/TURN|>' }}"
    "{% else %}{{ '<|TURN|><|USER|>' + m['content'] + '<|/TURN|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|TURN|><|BOT|>' }}{% endif %}"
)
# Command-A's reasoning models: an empty thinking block in the last answer alone.
COMMAND_A_LAST = COMMAND_A.replace(
    "'<|TURN|><|BOT|><|RESPONSE|>' +",
    "'<|TURN|><|BOT|>' + ('<|THINK|><|/THINK|>' if loop.last and not add_generation_prompt else '') + '<|RESPONSE|>' +",
)
# GLM-4: nothing ends a turn; the next role's token does.
GLM = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Qwen 3: tools, tool calls, and the reasoning of the last answer.
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + ('user' if m['role'] == 'tool' else m['role']) + '\n' }}"
    "{% if m.reasoning_content and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Gemma 3n and other multimodal models: content is a list of parts, and a string is ignored.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is not string %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# DeepSeek R1: what stands before </think> is cut from answers.
CUTS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ADDED_TOKENS = {
    PHI: ["<|user|>", "<|assistant|>", "<|end|>"],
    GPT_OSS: ["<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|channel|>"],
    COMMAND_A: ["<|TURN|>", "<|/TURN|>", "<|BOT|>", "<|USER|>", "<|RESPONSE|>", "<|/RESPONSE|>"],
    COMMAND_A_LAST: [
        *("<|TURN|>", "<|/TURN|>", "<|BOT|>", "<|USER|>", "<|RESPONSE|>", "<|/RESPONSE|>", "<|THINK|>", "<|/THINK|>")
    ],
    GLM: ["<|user|>", "<|assistant|>"],
}
