"""How a problem is put to a model."""

from __future__ import annotations

from dataclasses import dataclass

from data.errors import DataError

Prompt = str | list[dict]

# Text around {prompt}. Source of both: the scripts of "Understanding R1-Zero-Like Training" (arXiv 2503.20783), whose table 2
# shows how much a base model's score depends on the choice.
TEMPLATES = {
    "qwen_math": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "r1_zero": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant first "
        "thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning process is "
        "enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
        "reasoning process here </think> <answer> answer here </answer>.\nUser: {prompt}\nAssistant: <think>"
    ),
}


@dataclass(frozen=True)
class PromptFormat:
    """From a set's problem to the prompt of a model.

    Args:
        style: ``chat``: messages, which the tokenizer's chat template renders, or plain text where it has none;
            ``as_is``: what the set holds, text or messages; ``qwen_math``, ``r1_zero``: text in the form of those base-model
            recipes; any text with ``{prompt}`` in it: that text.
        system: a system message in front of a chat that has none. instruction: a line behind a problem that is plain text, as
            "put your final answer within \\boxed{}"; a set of chats brings its own inside.

    Raises:
        DataError: an unknown style, or a system message where there is no chat.
    """

    style: str = "chat"
    system: str | None = None
    instruction: str | None = None

    def __post_init__(self):
        known = ("chat", "as_is", *TEMPLATES)
        if self.style not in known and "{prompt}" not in self.style:
            raise DataError(
                f"data.prompt.style={self.style!r} is not known. Expected one of {', '.join(known)}, or a text with {{prompt}} in it."
            )
        if self.system and self.style != "chat":
            raise DataError(
                f"data.prompt.system needs a chat, but data.prompt.style={self.style!r}. Use data.prompt.style=chat or drop it."
            )

    def __call__(self, problem: Prompt) -> Prompt:
        """The prompt of a problem given as text, or as a chat whose last message asks it."""
        if self.style == "as_is":
            return self._instructed(problem) if isinstance(problem, str) else problem
        if self.style == "chat":
            chat = problem if isinstance(problem, list) else [{"role": "user", "content": self._instructed(problem)}]
            if self.system and chat[0]["role"] != "system":
                chat = [{"role": "system", "content": self.system}, *chat]
            return [{"role": message["role"], "content": message["content"]} for message in chat]
        question = problem[-1]["content"] if isinstance(problem, list) else problem
        template = TEMPLATES.get(self.style)
        # the recipes say themselves how to answer; a template of the user's may leave that to the instruction
        return (template or self.style).replace("{prompt}", question if template else self._instructed(question))

    def _instructed(self, question: str) -> str:
        return f"{question}\n{self.instruction}" if self.instruction else question


def plain(prompt: Prompt) -> str:
    """A chat as the text of its messages, for a tokenizer without a chat template; text stays as it is."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt) + "\n"
