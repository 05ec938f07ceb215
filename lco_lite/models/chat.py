"""Text to tokens: how a conversation is written for a model, where its response ends, whose tokens are the same.

With a chat template the tokenizer writes the prompt. Without one the plain format is, for each message,
``### Role:`` on a line, its content, an empty line; then ``### Assistant:`` on a line and the response.
Prompt and response are tokenised apart, so the boundary between them never moves.

The prompt is always what the model is asked with, the template's generation prompt. An answer given as text (a
demonstration, a pair of a file) becomes what the template writes after that prompt in the whole conversation: gpt-oss's
``<|channel|>final<|message|>`` or Qwen 3's empty thought and the answer. What a model has sampled begins there anyway.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from lco_lite.errors import ModelError
from lco_lite.messages import Message, conversation
from lco_lite.sequences import Example
from lco_lite.user_code import bounded

_OPENED = re.compile(r"<(\w+)>\s*$")  # a generation prompt that ends in the thought it opens
_MARK = "lcoliteresponse"
TEMPLATE_SECONDS = 10  # the longest took milliseconds
PLAIN_TEMPLATE = (  # the plain format, for programs that know templates only
    "{{ bos_token }}{% for m in messages %}{{ '### ' + m.role | capitalize + ':\\n' + m.content + '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


class ChatFormat:
    """Writes conversations for one tokenizer.

    ``end`` is the token id that closes a response: what the template puts after an assistant turn if generation
    stops there, else EOS. Template arguments (``enable_thinking`` and the like) go to every call. ``warn`` is told,
    once each, where the template's whole conversation is not its generation prompt and an answer.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_args: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_args = dict(template_args or {})
        self.end, self._closing = self._end_of_turn()
        self._warn, self._warned = warn, set[str]()
        self._pieces: dict[int, str] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: Sequence[int]) -> str:
        """The response as text, specials left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """One token as it stands inside a text, specials too; part of a character as its bytes, ``<0xE2>``."""
        if token not in self._pieces:
            before = self.ids("a")  # a decoder drops the space that a text begins with
            alone, after = (
                self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (before, [*before, token])
            )
            piece = after.removeprefix(alone)
            if "\ufffd" in piece:
                names = {letter: f"<0x{byte:02X}>" for byte, letter in bytes_to_unicode().items()}
                piece = str(self.tokenizer.convert_ids_to_tokens(token))
                piece = piece if piece.startswith("<0x") else "".join(names.get(letter, letter) for letter in piece)
            self._pieces[token] = piece
        return self._pieces[token]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the response begins. Raises ModelError where the template refuses the messages."""
        return self.ids(self.prompt_text(messages))

    def response(self, text: str, closed: bool = True) -> list[int]:
        """Token ids of a text right after the prompt; ``closed`` appends the end of turn, one cut short has none."""
        return self.ids(text) + ([self.end] if closed else [])

    def choices(self, messages: Sequence[Message], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, with what the template has a model write before its answer (a channel, an empty
        thought), and of each text as the beginning of the answer."""
        prompt = self.prompt(messages) + self.ids(self.lead())
        return prompt, [self.response(text, closed=False) for text in texts]

    def answer(self, messages: Sequence[Message], text: str, closed: bool = True) -> list[int]:
        """Token ids of an answer given as text, with what the template writes around it (``answer_text``)."""
        written = self.answer_text(messages, text)
        if written != text:
            prompt = self.prompt_text(messages)
            ids, before = self.ids(prompt + written), self.ids(prompt)
            if ids[: len(before)] == before:  # a space that sentencepiece would double if tokenised apart
                return ids[len(before) :] + ([self.end] if closed else [])
        return self.response(written, closed)

    def example(self, messages: Sequence[Message], answer: str, closed: bool = True) -> Example:
        return Example(self.prompt(messages), self.answer(messages, answer, closed))

    def answer_text(self, messages: Sequence[Message], text: str) -> str:
        """What follows the prompt, up to the end of turn, for the answer ``text``.

        That is what the template writes there in the whole conversation. Where the prompt opens a thought, one in
        ``text`` goes on from there, and an answer without one closes it first; ``warn`` is told if the template itself
        would drop it (DeepSeek-R1's distillates), and where the two differ in any other way: there ``text`` stays as it
        is.
        """
        if self.tokenizer.chat_template is None:
            return text
        prompt = self.prompt_text(messages)
        whole = self._render([*messages, {"role": "assistant", "content": text}])
        if whole == prompt + text + self._closing:
            return text
        opened = _OPENED.search(prompt)
        start = opened.start() if opened else len(prompt)
        opening, close = (f"<{opened[1]}>", f"</{opened[1]}>") if opened else ("", "")
        goes_on = opened is not None and close in text
        if whole.startswith(prompt) and whole.endswith(self._closing) and _words(text) in _words(whole[start:]):
            written = whole[len(prompt) : len(whole) - len(self._closing)]
            if not (goes_on and written.lstrip().startswith(close)):  # an empty thought before that of the text
                return written
        if goes_on:
            return text.lstrip().removeprefix(opening).lstrip("\n")
        if opened and whole.startswith(prompt[:start]):
            written = whole[start:].removesuffix(self._closing)
            if written.removeprefix(opening).lstrip().startswith(close):
                return written.removeprefix(opening)
            if not written.startswith(opening):
                self._say(
                    "thought",
                    f"the chat template's prompt opens {opening}, which it leaves out of a finished conversation: "
                    f"given answers close it first. One with its own thought, `…{close}answer`, is taken as it is",
                )
                return f"\n{close}\n\n{written}"
        part = len(commonprefix([prompt + text, whole]))
        self._say(
            "difference",
            f"the chat template writes {whole[part:][:60]!r} where its prompt and the answer have "
            f"{(prompt + text)[part:][:60]!r}: given answers follow the prompt as they are",
        )
        return text

    def lead(self) -> str:
        """What the template has a model write between the prompt and the first word of its answer; mostly nothing."""
        lead = self.answer_text(conversation("x"), _MARK).partition(_MARK)[0]
        return lead if lead.strip() else ""

    def prompt_text(self, messages: Sequence[Message]) -> str:
        if self.tokenizer.chat_template is None:
            turns = [f"### {m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages]
            return (self.tokenizer.bos_token or "") + "".join(turns) + "### Assistant:\n"
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], **kw: Any) -> str:
        try:
            with bounded(TEMPLATE_SECONDS):
                return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **kw, **self.template_args)
        except TimeoutError as e:
            raise ModelError(f"the model's chat template takes over {TEMPLATE_SECONDS} s for a conversation") from e
        except Exception as e:  # jinja raises whatever the template's author chose
            roles = ", ".join(m["role"] for m in messages)
            raise ModelError(f"the model's chat template refuses a conversation of roles {roles}: {e}") from e

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(text)

    def _prove_template(self) -> None:
        """Raises ModelError where the template leaves out what is said: every prompt would be the same."""
        asked = self.prompt_text(conversation(_MARK))
        told = self._render([*conversation("x"), {"role": "assistant", "content": _MARK}])
        left_out = [who for who, text in (("user", asked), ("assistant", told)) if _MARK not in text]
        if left_out:
            template = self.tokenizer.chat_template
            what = "is empty" if not str(template).strip() else f"leaves out what {' and '.join(left_out)} say"
            raise ModelError(
                f"{self.tokenizer.name_or_path or 'the tokenizer'}: its chat_template (tokenizer_config.json or "
                f"chat_template.jinja) {what}: mend it, or delete it for the plain format"
            )

    def _end_of_turn(self) -> tuple[int, str]:
        """(the token that closes a response, all that the template writes after a last response)."""
        closing = ""
        if self.tokenizer.chat_template is not None:
            self._prove_template()
            turn = self._render([{"role": "user", "content": "x"}, {"role": "assistant", "content": _MARK}])
            closing = turn.partition(_MARK)[2]
            after = self.ids(closing.strip())
            if after and after[0] in self.tokenizer.all_special_ids + list(self.tokenizer.added_tokens_decoder):
                return after[0], closing
        if self.tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no EOS token and its template closes no turn: a response could never end"
            )
        return self.tokenizer.eos_token_id, closing


def _words(text: str) -> str:
    return "".join(text.split())


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
