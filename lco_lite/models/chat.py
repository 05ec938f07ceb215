"""Text to tokens: how a conversation is written for a model, where its response ends, whose tokens are the same.

With a chat template the tokenizer writes the prompt. Without one the plain format is, for each message,
``### Role:`` on a line, its content, an empty line; then ``### Assistant:`` on a line and the response.
Prompt and response are tokenised apart, so the boundary between them never moves.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lco_lite.errors import ModelError
from lco_lite.sequences import Example

Message = Mapping[str, str]


class ChatFormat:
    """Writes conversations for one tokenizer.

    ``end`` is the token id that closes a response: what the template puts after an assistant turn if generation
    stops there, else EOS. Template arguments (``enable_thinking`` and the like) go to every call.
    """

    def __init__(self, tokenizer: Any, template_args: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template_args = dict(template_args or {})
        self.end = self._end_of_turn()

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """The response as text, specials left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the response begins. Raises ModelError where the template refuses the messages."""
        return self.ids(self.prompt_text(messages))

    def response(self, text: str, closed: bool = True) -> list[int]:
        """Token ids of a response; ``closed`` appends the end of turn, a response cut short has none."""
        return self.ids(text) + ([self.end] if closed else [])

    def choices(self, messages: Sequence[Message], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, and of each text as the beginning of the response."""
        return self.prompt(messages), [self.response(text, closed=False) for text in texts]

    def example(self, messages: Sequence[Message], response: str, closed: bool = True) -> Example:
        return Example(self.prompt(messages), self.response(response, closed))

    def prompt_text(self, messages: Sequence[Message]) -> str:
        if self.tokenizer.chat_template is None:
            turns = [f"### {m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages]
            return (self.tokenizer.bos_token or "") + "".join(turns) + "### Assistant:\n"
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], **kw: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **kw, **self.template_args)
        except Exception as e:  # jinja raises whatever the template's author chose
            roles = ", ".join(m["role"] for m in messages)
            raise ModelError(f"the model's chat template refuses a conversation of roles {roles}: {e}") from e

    def _end_of_turn(self) -> int:
        if self.tokenizer.chat_template is not None:
            mark = "lcoliteresponse"
            turn = self._render([{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}])
            after = self.ids(turn.partition(mark)[2].strip())
            if after and after[0] in self.tokenizer.all_special_ids + list(self.tokenizer.added_tokens_decoder):
                return after[0]
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token and its template closes no turn: a response could never end"
            )
        return self.tokenizer.eos_token_id


class PlainText(ChatFormat):
    """One text without roles, as base models are asked: system text, worked examples and the problem, an empty line
    between them and a space before an answer. Special tokens are those that the tokenizer itself puts around a text.

    Text and tokens are those of lm-eval 0.4, which tokenises an answer together with its prompt.
    """

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer(self.prompt_text(messages))["input_ids"]

    def prompt_text(self, messages: Sequence[Message]) -> str:
        parts: list[str] = []
        for message in messages:
            if message["role"] == "assistant":
                parts[-1] += ("" if parts[-1][-1:].isspace() else " ") + message["content"]
            else:
                parts.append(message["content"])
        return "\n\n".join(parts)

    def choices(self, messages: Sequence[Message], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """The spaces that end a prompt belong to the answer. Raises ModelError where an answer has no token left."""
        text = self.prompt_text(messages)
        asked = text.rstrip()
        prompt, gap = self.tokenizer(asked)["input_ids"], text[len(asked) :] or " "
        answers = [self.tokenizer(asked + gap + answer)["input_ids"][len(prompt) :] for answer in texts]
        if not all(answers):
            raise ModelError(
                f"the tokenizer joins an answer to the end of its prompt ({asked[-20:]!r}): no token is left"
            )
        return prompt, answers


def conversation(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """One user turn, after a system message where there is one."""
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]


def check_same_tokenizer(policy: Any, reward_model: Any) -> None:
    """Raises ModelError unless the same ids mean the same tokens; one may have more of them at the end."""
    ours, theirs = ({i: t for t, i in tok.get_vocab().items()} for tok in (policy, reward_model))
    common = min(max(ours), max(theirs)) + 1
    differing = [i for i in range(common) if ours.get(i) != theirs.get(i)]
    if differing:
        i = differing[0]
        raise ModelError(
            f"policy and reward model have different tokenizers ({len(ours)} and {len(theirs)} tokens): "
            f"{len(differing)} ids differ, the first is {i}: {ours.get(i)!r} and {theirs.get(i)!r}. "
            "A reward model of the policy's family is needed."
        )
