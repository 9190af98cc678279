"""What a model reads: the same everywhere, cut once, and dealt so that nothing is missed and nothing leaks."""

import itertools
import random
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

from deepseek_lit import data
from deepseek_lit.config import InputError
from deepseek_lit.data import (
    Corpus, Domain, batches, builtin_mixture, calculations, docstrings, kept_out, long_comments, pack, pack_domains, prose, read_domains, read_files, read_sources, split,
    standard_library, train_tokenizer, windows,
)  # fmt: skip

TEXTS = [f"def add_{i}(a, b):\n    return a + b + {i}\n" for i in range(60)]
SOURCE = '''# Copyright (c) Somebody
#
# Permission is hereby granted,
# to everybody, to do everything.

"""What this module does."""

class Box:
    """Holds a thing."""

    async def open(self):
        """Takes the thing out.

        Indented further.
        """
        return 1  # a remark

x = """no docstring, a string"""
'''


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_standard_library_is_found_in_order_and_without_what_differs_between_machines():
    root, files = Path(sysconfig.get_paths()["stdlib"]), standard_library()
    assert {"argparse.py", "textwrap.py"} <= {file.name for file in files} and files == sorted(files)
    for file in files:
        parts = file.relative_to(root).parts
        assert not {"test", "tests", "site-packages", "dist-packages", "encodings"} & set(parts)
        assert not any(part.startswith(("_sysconfigdata", "config-")) for part in parts)


def test_sources_that_are_not_utf8_are_left_out(tmp_path):
    for name, content in (("a.py", b"x = 1\n"), ("b.py", b"# \xff\xfe\n"), ("c.py", "y = 'é'\n".encode())):
        (tmp_path / name).write_bytes(content)
    assert read_sources(sorted(tmp_path.iterdir())) == ["x = 1\n", "y = 'é'\n"]


def test_docstrings_come_out_without_indentation_and_strings_do_not():
    assert docstrings(SOURCE) == ["What this module does.", "Holds a thing.", "Takes the thing out.\n\nIndented further."]
    assert docstrings("def broken(:") == [] and docstrings("x = '\0'") == []


def test_long_comments_lose_their_marks_and_short_ones_do_not_count():
    assert long_comments(SOURCE) == ["Copyright (c) Somebody\n\nPermission is hereby granted,\nto everybody, to do everything."]
    assert long_comments("# one\n# two\n# three\nx = 1\n") == []
    assert prose(SOURCE, shortest=20).split("\n\n")[-1] == "Indented further." and "remark" not in prose(SOURCE, 1)


@pytest.mark.parametrize("kind", range(4))
def test_calculations_are_right(kind):
    for line in calculations(4, held_out=False)[kind].splitlines():
        left, sign, right, *result = line.split()
        if result:
            assert sign == "+-*"[kind] and eval(f"{left} {sign} {right}") == int(result[1]) >= 0
        else:
            assert kind == 3 and eval(f"{left} {'==' if sign == '=' else sign} {right}")


def test_what_is_kept_out_never_occurs_in_training_whatever_the_seed():
    for seed in range(3):
        assert not any(kept_out(line + "\n") for text in calculations(40, False, seed) for line in text.splitlines())
        assert all(kept_out(line + "\n") for text in calculations(8, True, seed) for line in text.splitlines())
    every = {f"{a} + {b} = {a + b}\n" for a in range(50) for b in range(50)}
    assert 0.07 < sum(map(kept_out, every)) / len(every) < 0.13


def test_calculations_are_the_same_on_every_machine():
    assert calculations(2, held_out=False)[0][:47] == "5 + 2 = 7\n10 + 7 = 17\n25 + 12 = 37\n9 + 34 = 43\n"[:47]
    state = random.getstate()
    assert calculations(3, True) == calculations(3, True) != calculations(3, True, seed=1) and random.getstate() == state


def test_the_mixture_splits_files_before_it_takes_english_out_of_them(monkeypatch):
    sources = [f'"""The docstring of module number {i}, {"which is long enough to count. " * 4}"""\nx = {i}\n' for i in range(81)]
    monkeypatch.setattr(data, "standard_library", lambda: [])
    monkeypatch.setattr(data, "read_sources", lambda files: sources)
    mixture = builtin_mixture()
    assert mixture["python"].held_out == [sources[0], sources[40], sources[80]] and len(mixture["python"].texts) == 78
    learned = "\n".join(mixture["english"].texts)
    assert all(f"number {i}," not in learned and f"number {i}," in "\n".join(mixture["english"].held_out) for i in (0, 40, 80))
    assert sum(domain.weight for domain in mixture.values()) == pytest.approx(1)


def test_tokenizer_reads_every_byte_and_never_loses_one():
    tokenizer = train_tokenizer(TEXTS, 320)
    for text in ("".join(map(chr, range(256))), "naïve 東京 ひらがな 🦊\r\n\t \x00 １２３４ 12345", "   ", "\n\n"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert max(ids) < 320


def test_tokenizer_has_the_releases_special_tokens_and_cuts():
    tokenizer = train_tokenizer(TEXTS, 320)
    assert [tokenizer.token_to_id(token) for token in (data.BOS, data.EOS)] == [0, 1]
    assert tokenizer.encode("ab<｜end▁of▁sentence｜>").ids[-1] == 1
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("12345 words")]
    assert pieces == ["123", "45", "Ġwords"]


def test_the_same_text_makes_the_same_tokenizer():
    assert train_tokenizer(TEXTS, 400).to_str() == train_tokenizer(TEXTS, 400).to_str()


def test_pack_puts_every_text_between_bos_and_eos():
    tokenizer = train_tokenizer(TEXTS, 320)
    row = pack(TEXTS[:2], tokenizer).tolist()
    assert row == [0, *tokenizer.encode(TEXTS[0]).ids, 1, 0, *tokenizer.encode(TEXTS[1]).ids, 1]


@pytest.mark.parametrize("length", [11, 12, 25, 100, 1001])
def test_a_round_meets_all_of_the_row_once_and_the_next_is_cut_elsewhere(length):
    stream, offsets = windows(torch.arange(length), 10, seeded()), set()
    for _ in range(4):
        first = next(stream)
        offset = int(first[0]) % 10 if length > 20 else int(first[0])
        count = (length - 1 - offset) // 10
        met = Counter(torch.cat([first[:-1], *(next(stream)[:-1] for _ in range(count - 1))]).tolist())
        assert set(met.values()) == {1} and len(met) == 10 * count >= length - 20
        offsets.add(offset)
    assert len(offsets) > 1 or length < 13


def test_windows_lie_in_the_row_and_the_last_token_can_be_a_target():
    ends = {int(window[-1]) for window in itertools.islice(windows(torch.arange(31), 10, seeded()), 60)}
    assert max(ends) == 30
    assert all(torch.equal(window, torch.arange(int(window[0]), int(window[0]) + 11)) for window in itertools.islice(windows(torch.arange(31), 10, seeded()), 60))


def test_a_row_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="the text has 10 tokens, expected more than 10"):
        next(windows(torch.arange(10), 10, seeded()))
    assert next(windows(torch.arange(11), 10, seeded())).tolist() == list(range(11))


def corpus_of(**rows) -> Corpus:
    return Corpus({name: row for name, (row, _) in rows.items()}, {}, {name: weight for name, (_, weight) in rows.items()})


def test_targets_are_the_next_token():
    for inputs, targets in itertools.islice(batches(corpus_of(a=(torch.arange(500), 1.0)), 4, 10, seed=0), 20):
        assert torch.equal(targets, inputs + 1) and inputs.dtype == torch.int64 and inputs.shape == (4, 10)


def test_domains_come_by_weight_and_not_by_size():
    corpus = corpus_of(large=(torch.zeros(5000, dtype=torch.int32), 1.0), small=(torch.ones(200, dtype=torch.int32), 3.0))
    share = torch.cat([inputs[:, 0] for inputs, _ in itertools.islice(batches(corpus, 8, 10, seed=0), 200)]).float().mean()
    assert abs(share - 0.75) < 0.04


def test_batches_follow_from_the_seed_and_can_be_skipped():
    corpus = corpus_of(a=(torch.arange(300), 1.0), b=(torch.arange(1000, 1200), 2.0))
    whole = [inputs for inputs, _ in itertools.islice(batches(corpus, 4, 10, seed=3), 30)]
    rest = [inputs for inputs, _ in itertools.islice(batches(corpus, 4, 10, seed=3), 20, 30)]
    assert all(map(torch.equal, whole[20:], rest))
    assert not torch.equal(whole[0], next(batches(corpus, 4, 10, seed=4))[0])


def test_pack_domains_keeps_names_weights_and_halves():
    tokenizer = train_tokenizer(TEXTS, 320)
    corpus = pack_domains({"a": Domain(2.0, TEXTS[:9], TEXTS[9:10])}, tokenizer)
    assert torch.equal(corpus.rows["a"], pack(TEXTS[:9], tokenizer)) and torch.equal(corpus.held_out["a"], pack(TEXTS[9:10], tokenizer)) and corpus.weights == {"a": 2.0}


def test_domains_from_files(tmp_path):
    (tmp_path / "many" / "deep").mkdir(parents=True)
    for i in range(40):
        (tmp_path / "many" / ("deep" if i % 2 else ".") / f"{i:02}.txt").write_text(f"text {i}")
    (tmp_path / "one.md").write_text("x" * 95 + "y" * 5)
    domains = read_domains({"many": {"files": [str(tmp_path / "many")], "weight": 2}, "one": {"files": [str(tmp_path / "*.md")]}}, "run.json")
    assert (len(domains["many"].texts), len(domains["many"].held_out), domains["many"].weight) == (38, 2, 2)
    assert domains["one"].texts == ["x" * 95] and domains["one"].held_out == ["y" * 5] and domains["one"].weight == 1.0
    assert read_files([str(tmp_path / "many" / "**" / "0*.txt"), str(tmp_path / "many" / "02.txt")], "") == sorted((tmp_path / "many").rglob("0*.txt"))


def test_split_takes_every_so_manieth():
    assert split(list("abcdefg"), 3) == (["b", "c", "e", "f"], ["a", "d", "g"])
