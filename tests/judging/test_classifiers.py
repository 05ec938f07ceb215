"""Reward models of both kinds against a computation by hand, and what is no reward model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from lco_lite.errors import ModelError
from lco_lite.judging.classifiers import SegmentClassifier, SequenceClassifier, Text, clauses, sentences
from lco_lite.models.loading import END, byte_tokenizer
from tests.judging.reward_folders import save_reward_model

CPU = torch.device("cpu")
TEXTS = [
    Text("Who sang it?", "wikipage: Song text: Ann sang it.", "Ann sang it. It came out in May. Bob wrote it."),
    Text("When?", "", "In May."),
    Text("Where?", "wikipage: Town text: A town.", ""),
]
LABELS = ["F-ERR", "Ignore", "O"]


def ids_of(words: list[str]) -> list[int]:
    tokenizer = byte_tokenizer(10_000)
    return [i for word in words for i in tokenizer(word, add_special_tokens=False)["input_ids"]]


def words_of(text: Text) -> list[str]:
    context = f" context: {text.context}" if text.context else ""
    marked = " ".join(f"{END} {sentence}" for sentence in sentences(text.answer))
    return f"question: {text.question}{context} answer: {marked}".split()


def test_a_token_classifier_rates_each_sentence_at_the_separator_before_it(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True, LABELS, seed=1)
    rewards = SegmentClassifier(str(folder), sentences, CPU, batch=2)(TEXTS)
    model = AutoModelForTokenClassification.from_pretrained(folder)
    seen = set()
    for text, reward in zip(TEXTS, rewards, strict=True):
        ids = ids_of(words_of(text))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        verdicts = [bool(logits[i, 2] > logits[i, 0]) for i, token in enumerate(ids) if token == ids_of([END])[0]]
        seen |= set(verdicts)
        assert reward.segments == len(verdicts) == len(sentences(text.answer))
        assert reward.good == sum(verdicts)
        expected = sum(1 if good else -1 for good in verdicts) / len(verdicts) if verdicts else -1.0
        assert reward.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "good"),
    [
        (["F-ERR", "Ignore", "O"], True),
        (["O", "Ignore", "F-ERR"], False),
        (["O", "NF-ERR"], False),
        (3, True),
        (2, True),
    ],
)
def test_the_names_of_the_labels_say_which_is_good(tmp_path, labels, good):
    folder = save_reward_model(tmp_path / "rm", True, labels)
    model = SegmentClassifier(str(folder), sentences, CPU)
    with torch.no_grad():  # the last label always wins
        model.model.score.weight.zero_()
        model.model.score.bias = torch.nn.Parameter(torch.arange(float(model.model.config.num_labels)))
    assert model(TEXTS[:1])[0].value == (1.0 if good else -1.0)


def test_clauses_are_rated_where_the_split_makes_them(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True, LABELS)
    text = Text("Who?", "", "It was Ann who sang it, and later on it was Bob who wrote it.")
    assert SegmentClassifier(str(folder), clauses, CPU)([text])[0].segments == 2
    assert SegmentClassifier(str(folder), sentences, CPU)([text])[0].segments == 1


@pytest.mark.parametrize("labels", [1, 2])
def test_a_sequence_classifier_rates_the_whole_answer_alone_or_in_a_batch(tmp_path, labels):
    folder = save_reward_model(tmp_path / "rm", False, labels)
    rewards = SegmentClassifier(str(folder), sentences, CPU, batch=3)(TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = byte_tokenizer(10_000)
    for text, reward in zip(TEXTS, rewards, strict=True):
        context = f" context: {text.context}" if text.context else ""
        written = f"question: {text.question}{context} answer: {text.answer}".strip()
        with torch.no_grad():
            logits = model(**tokenizer(written, return_tensors="pt")).logits[0]
        expected = logits[0] if labels == 1 else logits[1] - logits[0]
        assert reward.value == pytest.approx(float(expected), abs=1e-5)
        assert reward.good is None


@pytest.mark.parametrize("by_token", [True, False])
def test_passages_lose_their_end_where_the_input_is_too_long_and_the_answer_stays_whole(tmp_path, by_token):
    folder = save_reward_model(tmp_path / "rm", by_token, LABELS if by_token else 1, max_position_embeddings=200)
    model = SegmentClassifier(str(folder), sentences, CPU)
    long = Text("Who?", "word " * 500, "Ann did. Bob did too.")
    words, places = model._words(long)
    assert words[-1] == "too." and words[:4] == ["question:", "Who?", "context:", "word"]
    tokens = len(model._tokens([words], truncation=False)["input_ids"][0])
    assert model.window - 8 < tokens <= model.window == 200
    assert [words[at] for at in places] == ([END, END] if by_token else [])
    assert model([long])[0].segments == (2 if by_token else 0)


def test_segments_that_the_window_cuts_off_are_left_out(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True, LABELS, max_position_embeddings=64)
    answer = "Ann did it today. " * 20
    assert 1 <= SegmentClassifier(str(folder), sentences, CPU)([Text("Who?", "", answer)])[0].segments < 20


def test_what_is_no_reward_model_is_refused_with_what_is_wanted(tmp_path):
    from tests.models.families import save

    with pytest.raises(ModelError, match="LlamaForCausalLM; a token- or sequence-classification model is needed"):
        SegmentClassifier(str(save("llama", tmp_path / "lm")), sentences, CPU)
    with pytest.raises(ModelError, match="no such folder"):
        SegmentClassifier(str(tmp_path / "none"), sentences, CPU)
    with pytest.raises(ModelError, match="labels A, B, C, D"):
        SegmentClassifier(str(save_reward_model(tmp_path / "four", True, list("ABCD"))), sentences, CPU)
    with pytest.raises(ModelError, match="one label, or two"):
        SegmentClassifier(str(save_reward_model(tmp_path / "three", False, 3)), sentences, CPU)


def test_a_head_that_is_missing_is_not_made_up(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True, LABELS)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if not k.startswith("score")}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match="weights are missing, e.g. score"):
        SegmentClassifier(str(folder), sentences, CPU)


def test_pickled_weights_are_refused(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True, LABELS)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        SegmentClassifier(str(folder), sentences, CPU)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    folder = save_reward_model(tmp_path / "rm", True, LABELS)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: pass\n")
    with pytest.raises(ModelError):
        SegmentClassifier(str(folder), sentences, CPU)
    assert not (tmp_path / "ran").exists()


def roberta_shaped(**options):
    """A tokenizer of single bytes, and the sizes of a tiny model for it."""
    import transformers as tf
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters])}
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tf.RobertaTokenizer(vocab=vocab, merges=[], **options), size | {"vocab_size": len(vocab), "pad_token_id": 1}


def test_a_roberta_shaped_model_reads_word_by_word_within_its_positions(tmp_path):
    """Longformer is made like this: byte-level BPE, positions that start after the padding id, </s> as separator."""
    import transformers as tf

    tokenizer, size = roberta_shaped()
    config = tf.LongformerConfig(max_position_embeddings=130, attention_window=16, num_labels=3, **size)
    config.id2label = dict(enumerate(LABELS))
    tf.LongformerForTokenClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    model = SegmentClassifier(str(tmp_path / "rm"), sentences, CPU)
    assert model.separator == "</s>" and model.window <= 128
    rewards = model([Text("Who?", "word " * 100, "Ann did. Bob did too."), Text("Who?", "", "Ann.")])
    assert [one.segments for one in rewards] == [2, 1]


@pytest.mark.parametrize("limit", [{"model_max_length": 128}, {}])
def test_a_text_longer_than_a_roberta_shaped_models_positions_loses_its_beginning(tmp_path, limit):
    import transformers as tf

    tokenizer, size = roberta_shaped(**limit)
    config = tf.RobertaConfig(max_position_embeddings=130, num_labels=1, initializer_range=0.3, **size)
    torch.manual_seed(0)
    tf.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    score = SequenceClassifier(str(tmp_path / "rm"), CPU)
    long, end, beginning = score([[]] * 3, ["y" * 400 + "x" * 126, "x" * 126, "y" * 126])
    assert long == pytest.approx(float(end), abs=1e-5) and abs(long - beginning) > 1e-3
