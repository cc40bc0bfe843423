import pytest

from data.errors import DataError
from data.prompts import PromptFormat, plain

CHAT = [{"role": "user", "content": "1+1?"}]


def test_a_problem_in_each_style():
    assert PromptFormat("as_is")("1+1?") == "1+1?"
    assert PromptFormat("as_is", instruction="Box it.")("1+1?") == "1+1?\nBox it."
    assert PromptFormat(instruction="Box it.")("1+1?") == [{"role": "user", "content": "1+1?\nBox it."}]
    assert PromptFormat(system="S")("1+1?")[0] == {"role": "system", "content": "S"}
    assert PromptFormat("Q: {prompt} in \\boxed{}. A:")("{1}") == "Q: {1} in \\boxed{}. A:"
    assert PromptFormat("Q: {prompt}", instruction="Box it.")("1+1?") == "Q: 1+1?\nBox it."
    assert PromptFormat("qwen_math", instruction="not twice")("1+1?").endswith(
        "\\boxed{}.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert PromptFormat("r1_zero")("1+1?").endswith("</answer>.\nUser: 1+1?\nAssistant: <think>")


def test_a_chat_keeps_its_own_instruction_and_is_asked_by_its_last_message():
    assert PromptFormat(instruction="Box it.")(CHAT) == PromptFormat("as_is", instruction="Box it.")(CHAT) == CHAT
    assert PromptFormat("r1_zero")(CHAT) == PromptFormat("r1_zero")("1+1?")
    own = [{"role": "system", "content": "own"}, *CHAT]
    assert PromptFormat(system="S")(own) == own
    assert plain(own) == "own\n1+1?\n" and plain("x") == "x"


def test_what_is_refused():
    with pytest.raises(DataError, match="style='chatt' is not known. Expected one of chat, as_is, qwen_math, r1_zero"):
        PromptFormat("chatt")
    with pytest.raises(DataError, match="data.prompt.system needs a chat"):
        PromptFormat("r1_zero", system="S")
