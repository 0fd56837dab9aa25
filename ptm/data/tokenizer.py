"""Text to ids and back: a tokenizer.json, a sentencepiece model, or a byte-level BPE trained here.

All three stand behind `Tokenizer`. What holds for each of them:

* `encode` never adds a token of its own (no BOS) and, unless told `special=True`, reads the text of
  a special token in a document as plain characters where the format allows it.
* `eod_id` ends a document, `sep_id` parts a question from its answer in M32's prompts. They are
  found by name. M32's sentencepiece file holds them as pieces <eod> 77185 and <sep> 77187; the ids
  that its published code adds above the pieces (<mask>, <FIM_...>) are not produced here.
* Before sentencepiece sees a text, `<n>` in it becomes a newline, as in M32's own preprocessing:
  sentencepiece would spell it out as three characters otherwise.
* A broken or hostile file is a DataError of one line: sizes and ids are bounded, and nothing in
  either format is ever executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from ptm.common.env import set_default
from ptm.common.errors import DataError, line

EOD_NAMES = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>")
SEP_NAMES = ("<sep>",)
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>")
TRAINED_SPECIALS = ("<eod>", "<sep>", "<pad>")
MIN_TRAINED_VOCAB = 256 + len(TRAINED_SPECIALS)
MAX_FILE_BYTES = 256 << 20
MAX_VOCAB = 1 << 22
REMEDY = "give a tokenizer.json or a sentencepiece *.model that works, or leave data.tokenizer out"


class Tokenizer(Protocol):
    """What the rest of ptm knows of a tokenizer. Made by `load_tokenizer` or `train_tokenizer`."""

    vocab_size: int
    """One more than the largest id."""
    eod_id: int
    sep_id: int | None
    pad_id: int | None
    specials: dict[str, int]
    """The text of each special token and its id."""
    fingerprint: str
    """Hash of the file: two tokenizers with the same one give the same ids."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text; with `special`, the names in `specials` become their ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens and ids beyond the vocabulary stand for nothing."""
        ...

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, (vocab_size,) int64; 0 for special tokens.

        Exact for byte-level tokenizers. A sentencepiece tokenizer puts a space before the text, so
        the sum over a document is one more than its bytes.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the file that `load_tokenizer(folder)` reads."""
        ...


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer.json, a sentencepiece *.model, or a folder that holds one of them.

    Raises: DataError.
    """
    path = Path(path)
    if path.is_dir():
        found = [p for p in (path / "tokenizer.json", *sorted(path.glob("*.model"))) if p.is_file()]
        if not found:
            raise _error(path, "the folder holds no tokenizer.json and no *.model")
        path = found[0]
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _error(path, f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
        content = path.read_bytes()
    except OSError as e:
        raise _error(path, f"cannot be read: {e.strerror}") from None
    kind = SentencePiece if path.suffix == ".model" else BytePair
    return kind(content, path)


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with GPT-2's word splitting; the same texts give the same file.

    A small corpus may have fewer than `vocab_size` entries to offer.
    Raises: DataError when `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_TRAINED_VOCAB:
        rule = f"a byte-level BPE needs at least {MIN_TRAINED_VOCAB} entries"
        raise DataError(line("model.vocab_size", vocab_size, rule, "raise it"))
    set_default("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers

    rust = Rust(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    rust.decoder = decoders.ByteLevel()  # type: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(TRAINED_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(texts, trainer)
    return BytePair(rust.to_str(pretty=True).encode(), Path("trained tokenizer.json"))


class _Base:
    """What both kinds share: special tokens by name, and texts that may hold them."""

    file_name: str

    def __init__(self, content: bytes, path: Path) -> None:
        self.content = content
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self.specials: dict[str, int] = {}
        self.vocab_size, self.eod_id = 0, -1
        self.sep_id: int | None = None
        self.pad_id: int | None = None
        try:
            self._open(path)
        except DataError:
            raise
        # The libraries raise anything here: tokenizers' Rust panics are not even Exceptions.
        except BaseException as e:
            if isinstance(e, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            why = " ".join(str(e).split())[:200]
            raise _error(path, f"not a usable {self.file_name}: {why}") from None
        if self.eod_id < 0:
            raise _error(path, f"has no end of document token ({', '.join(EOD_NAMES)})")
        names = sorted(self.specials, key=len, reverse=True)
        self._special_text = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def _open(self, path: Path) -> None:
        raise NotImplementedError

    def _plain(self, text: str) -> list[int]:
        raise NotImplementedError

    def _find_specials(self, find: Any) -> None:
        """`find(name)` gives an id or None."""
        for names, key in ((EOD_NAMES, "eod_id"), (SEP_NAMES, "sep_id"), (PAD_NAMES, "pad_id")):
            found = next((name for name in names if find(name) is not None), None)
            if found is not None:
                setattr(self, key, find(found))
                self.specials[found] = find(found)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if not special:
            return self._plain(text)
        parts = self._special_text.split(text)
        ids: list[int] = []
        for i, part in enumerate(parts):  # odd ones are special tokens
            ids += [self.specials[part]] if i % 2 else self._plain(part) if part else []
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._plain(text) for text in texts]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file_name).write_bytes(self.content)


class BytePair(_Base):
    """A tokenizer.json of the tokenizers library, of any model kind."""

    file_name = "tokenizer.json"

    def _open(self, path: Path) -> None:
        from tokenizers import Tokenizer as Rust

        self.rust = Rust.from_buffer(self.content)
        self.rust.no_padding()
        self.rust.no_truncation()
        self.rust.encode_special_tokens = True  # special names in a document stay characters
        added = self.rust.get_added_tokens_decoder()
        self.vocab_size = 1 + max([*self.rust.get_vocab(True).values(), *added], default=-1)
        if not 0 < self.vocab_size <= MAX_VOCAB:
            raise ValueError(f"its ids go up to {self.vocab_size - 1}, beyond {MAX_VOCAB}")
        self.specials = {t.content: i for i, t in added.items() if t.special and t.content}
        self._find_specials(self.rust.token_to_id)
        # A damaged file can be read and still fail on every text.
        self._plain("a b\n1")
        self.decode(range(self.vocab_size))

    def _plain(self, text: str) -> list[int]:
        return self.rust.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = self.rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self.specials.values())
        known = [i for i in map(int, ids) if i not in special and i < self.vocab_size]
        return self.rust.decode(known, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int64)
        is_byte_level = '"ByteLevel"' in json.dumps(json.loads(self.content).get("decoder"))
        special = set(self.specials.values())
        for piece, i in self.rust.get_vocab(True).items():
            if i not in special:
                counts[i] = len(piece) if is_byte_level else _piece_bytes(piece)
        return counts


class SentencePiece(_Base):
    """A sentencepiece *.model, such as M32's."""

    file_name = "tokenizer.model"

    def _open(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        if not self.content:
            raise ValueError("the file is empty")
        self.processor = SentencePieceProcessor(model_proto=self.content)  # type: ignore
        self.vocab_size = self.processor.get_piece_size()
        for i in range(self.vocab_size):
            if self.processor.is_control(i):
                self.specials[self.processor.id_to_piece(i)] = i
        self._find_specials(self._id_of)
        # A damaged file can be read and still hold pieces that are no text.
        self._plain("a b\n1")
        self.decode(range(self.vocab_size))
        self.token_bytes()

    def _id_of(self, name: str) -> int | None:
        i = self.processor.piece_to_id(name)  # the id of <unk> when there is no such piece
        return i if self.processor.id_to_piece(i) == name else None

    def _plain(self, text: str) -> list[int]:
        return self.processor.encode(text.replace("<n>", "\n"), add_bos=False, add_eos=False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [text.replace("<n>", "\n") for text in texts]
        return self.processor.encode(texts, add_bos=False, add_eos=False, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        special = set(self.specials.values())
        known = [i for i in map(int, ids) if i not in special and i < self.vocab_size]
        return self.processor.decode(known)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int64)
        special = set(self.specials.values())
        for i in range(self.vocab_size):
            if i not in special and not self.processor.is_unknown(i):
                counts[i] = _piece_bytes(self.processor.id_to_piece(i))
        return counts


def _piece_bytes(piece: str) -> int:
    # sentencepiece's spelling: a low line block for a space, <0x0A> for a byte; WordPiece's ##.
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
        return 1
    return len(piece.removeprefix("##").replace("\u2581", " ").encode())


def _error(path: Path, rule: str) -> DataError:
    return DataError(line("data.tokenizer", path, rule, REMEDY))
