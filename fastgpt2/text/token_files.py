"""Token files of other programs: llm.c's ``.bin`` shards, nanoGPT's ``train.bin`` and ``val.bin``.

llm.c (karpathy/llm.c, dev/data/data_common.py; the format of FineWeb's published shards): a header
of 256 int32 (magic 20240520, version 1, number of ids, zeros), then the ids as uint16. nanoGPT
(karpathy/nanoGPT, data/*/prepare.py): uint16 ids and nothing else. All numbers are little-endian.
"""

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt2.errors import UserError
from fastgpt2.text.bpe import ENCODER, MERGES
from fastgpt2.text.encoding import Tokenizer
from fastgpt2.text.matches import files_below, matching_files
from fastgpt2.text.own_files import without_runs
from fastgpt2.text.stored import StoredTokens, TokenFile
from fastgpt2.text.tokenizers import FILE_NAME, IdTokenizer, get_tokenizer, load_tokenizer
from fastgpt2.text.utf8 import kind_of_bytes, looks_like_text

SUFFIX = ".bin"
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
LLMC_HEADER_BYTES = 1024
UINT16 = np.dtype("<u2")
# nanoGPT's files have no header: only their names identify them
NANOGPT_TRAIN, NANOGPT_VAL, NANOGPT_META = "train.bin", "val.bin", "meta.pkl"
# other files of llm.c that begin with a number of this kind
_OTHER_MAGIC = {
    20240801: "a token file of llm.c for Llama 3 (uint32 ids)",
    20240522: "an evaluation file of llm.c (HellaSwag)",
    20240326: "weights of llm.c",
    20240327: "a debug state of llm.c",
    20240328: "a tokenizer of llm.c",
}
_VALIDATION = {"val", "valid", "validation"}
# bytes read to tell ids from text and from wider numbers in a file without a header
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class FoundFiles:
    """The token files that ``--data`` names.

    Attributes:
        train: files for training; all files if none, or every one, is named as validation.
        val: files whose names say validation (``val``, ``valid``, ``validation``).
        left_out: files in the same folders that do not hold token ids.
    """

    train: tuple[Path, ...]
    val: tuple[Path, ...]
    left_out: tuple[Path, ...]

    @property
    def all(self) -> tuple[Path, ...]:
        """Training files, then validation files."""
        return self.train + self.val


def find_token_files(data: str | Sequence[str]) -> FoundFiles | None:
    """The token files that ``data`` names; None if it names none.

    From a folder with ``train.bin`` and ``val.bin``, as nanoGPT's, these two are taken; from any
    other folder or pattern, all files that end in ``.bin``.

    Args:
        data: what ``build_dataset`` takes: one of these, or several.

    Raises:
        UserError: token files together with something else.
    """
    items = [data] if isinstance(data, str) else list(data)
    found = {item: _files_of(item) for item in items}
    files = [path for bins, _ in found.values() for path in bins]
    if not files:
        return None
    for item, (bins, _) in found.items():
        if not bins:
            raise UserError(
                f"data: {files[0]} holds token ids and {item} does not; give one kind alone"
            )
    left_out = tuple(path for _, others in found.values() for path in others)
    files = list(dict.fromkeys(files))
    val = tuple(path for path in files if _is_validation(path))
    train = tuple(path for path in files if path not in val)
    return FoundFiles(train, val, left_out) if train else FoundFiles(val, (), left_out)


def _files_of(item: str) -> tuple[list[Path], list[Path]]:
    """The token files of one item, and its other files."""
    path = Path(item)
    pair = [path / NANOGPT_TRAIN, path / NANOGPT_VAL]
    if path.is_dir() and all(file.is_file() for file in pair):
        return pair, []
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = without_runs(files_below(path))
    else:
        files = [] if path.exists() else without_runs(matching_files(item))
    bins = [file for file in files if file.suffix.lower() == SUFFIX]
    known = {NANOGPT_META, FILE_NAME, ENCODER, MERGES}
    return bins, [file for file in files if file not in bins and file.name not in known]


def _is_validation(path: Path) -> bool:
    return not _VALIDATION.isdisjoint(re.split(r"[^a-z]+", path.stem.lower()))


def open_token_files(
    found: FoundFiles, vocab_size: int
) -> tuple[StoredTokens, StoredTokens | None]:
    """Training and validation ids, with headers and sizes checked; the ids are not checked yet.

    Args:
        found: the files.
        vocab_size: V; every id is in [0, V).

    Raises:
        UserError: a file is not a token file, is damaged or cut off.
    """
    parts = [[read_header(path) for path in paths] for paths in (found.train, found.val)]
    train, val = (StoredTokens(files, vocab_size) if files else None for files in parts)
    assert train is not None
    return train, val


def check_headers(found: FoundFiles) -> None:
    """Raise the errors of ``open_token_files`` before a vocabulary is looked for.

    Args:
        found: the files.

    Raises:
        UserError: a file is not a token file, is damaged or cut off.
    """
    for path in found.all:
        read_header(path)


def read_header(path: Path) -> TokenFile:
    """The place of the ids in a token file.

    Args:
        path: llm.c's file, or nanoGPT's under one of its two names.

    Raises:
        UserError: it cannot be read, is another kind of file, or has the wrong size.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            size = file.seek(0, 2)
    except OSError as error:
        raise UserError(f"token file {path}: cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"token file {path}: is empty")
    magic = int.from_bytes(head[:4], "little")
    swapped = int.from_bytes(head[:4], "big")
    if magic == LLMC_MAGIC:
        return _read_llmc(path, head, size)
    if swapped == LLMC_MAGIC:
        raise UserError(
            f"token file {path}: its numbers are big-endian; they must be little-endian"
        )
    if magic in _OTHER_MAGIC:
        raise UserError(f"token file {path}: is {_OTHER_MAGIC[magic]}, not token ids in uint16")
    kind = kind_of_bytes(head)
    if path.name.lower() not in (NANOGPT_TRAIN, NANOGPT_VAL):
        raise UserError(
            f"token file {path}: expected llm.c's magic number {LLMC_MAGIC} at offset 0, got "
            f"{magic}{f' (it is {kind})' if kind else ''}; only {NANOGPT_TRAIN} and {NANOGPT_VAL} "
            "of nanoGPT have no header"
        )
    # a few ids may look like letters by chance
    if kind is None and len(head) >= 16 and looks_like_text(head):
        kind = "text"
    if kind is not None:
        raise UserError(f"token file {path}: is {kind}, not token ids in uint16")
    return _read_nanogpt(path, head, size)


def _read_llmc(path: Path, head: bytes, size: int) -> TokenFile:
    if len(head) < LLMC_HEADER_BYTES:
        raise UserError(
            f"token file {path}: cut off: the header has {len(head)} of {LLMC_HEADER_BYTES} bytes"
        )
    _, version, count = struct.unpack_from("<3i", head)
    if version != LLMC_VERSION:
        raise UserError(
            f"token file {path}: expected version {LLMC_VERSION} at offset 4, got {version}"
        )
    if count < 1:
        raise UserError(f"token file {path}: expected a number of ids at offset 8, got {count}")
    body, expected = size - LLMC_HEADER_BYTES, count * UINT16.itemsize
    if body != expected:
        width = body / count
        why = f": ids of {width:.0f} bytes, expected uint16" if width in (4, 8) else ""
        raise UserError(
            f"token file {path}: its header says {count} ids, which is {expected} bytes after "
            f"offset {LLMC_HEADER_BYTES}; the file has {body}{why}"
        )
    return TokenFile(path, LLMC_HEADER_BYTES, UINT16, count)


def _read_nanogpt(path: Path, head: bytes, size: int) -> TokenFile:
    if size % UINT16.itemsize:
        raise UserError(
            f"token file {path}: {size} bytes, an odd number, cannot be ids in uint16; the file is "
            "cut off or of another kind"
        )
    ids = np.frombuffer(head[: len(head) // 8 * 8], UINT16)
    # ids of a wider type have zeros in their upper halves
    if ids.size >= 64 and not ids[1::2].any() and ids[0::2].any():
        raise UserError(
            f"token file {path}: every second number is 0: ids of 4 or 8 bytes, expected uint16"
        )
    return TokenFile(path, 0, UINT16, size // UINT16.itemsize)


def recorded_tokenizer(found: FoundFiles) -> Tokenizer | None:
    """The tokenizer that ``prepare --to`` saved beside the files.

    Args:
        found: the files.

    Raises:
        UserError: it is damaged, or several folders have different tokenizers.
    """
    folders = dict.fromkeys(path.parent for path in found.all)
    tokenizers = [(f, load_tokenizer(f)) for f in folders if (f / FILE_NAME).is_file()]
    for folder, tokenizer in tokenizers[1:]:
        if tokenizer.fingerprint != tokenizers[0][1].fingerprint:
            raise UserError(
                f"data: the token files in {tokenizers[0][0]} and {folder} are of different "
                "tokenizers"
            )
    return tokenizers[0][1] if tokenizers else None


def tokenizer_of(
    found: FoundFiles,
    wanted: str | Tokenizer,
    *,
    vocab_dir: str | Path | None = None,
    vocab_size: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> Tokenizer:
    """The tokenizer of the ids, which the files themselves do not record.

    ``prepare --to`` saves it beside the files. Otherwise it is the one that ``wanted`` names
    (``auto`` means GPT-2's); with ``vocab_size`` the ids have no text.

    Args:
        found: the files.
        wanted: a name, or the tokenizer of a model.
        vocab_dir: folder with GPT-2's vocabulary files.
        vocab_size: V, if no tokenizer is known.
        notify: called with a line that says what was chosen.

    Raises:
        UserError: the tokenizer is unknown, or two sources disagree.
    """
    recorded = recorded_tokenizer(found)
    if not isinstance(wanted, str):
        _check_tokenizer(found, wanted, recorded, vocab_size)
        return wanted
    if recorded is not None:
        if wanted not in ("auto", recorded.name) or vocab_size not in (None, recorded.vocab_size):
            asked = f"--tokenizer {wanted}" if vocab_size is None else f"--vocab-size {vocab_size}"
            raise UserError(
                f"{asked}: {FILE_NAME} beside the token files says that their ids are of "
                f"{recorded.name} ({recorded.vocab_size} ids)"
            )
        return recorded
    if vocab_size is not None:
        if wanted not in ("auto", "ids"):
            raise UserError(
                f"--vocab-size {vocab_size} and --tokenizer {wanted} exclude each other: a size "
                "alone is for ids of an unknown tokenizer"
            )
        return IdTokenizer(vocab_size)
    first, meta = found.all[0], _meta(found)
    if wanted in ("auto", "ids") and meta is not None:
        raise UserError(
            f"data: {meta} has the vocabulary of {first.name}, but a pickle can run any code, "
            "so it is never opened; give the number of ids: --vocab-size N (nanoGPT's prepare.py "
            "prints it; 65 for shakespeare_char)"
        )
    if wanted == "ids":
        raise UserError("--tokenizer ids: give the number of ids: --vocab-size N")
    if wanted == "char":
        raise UserError(f"--tokenizer char: {first} has no characters; give --vocab-size N")
    name = "gpt2" if wanted == "auto" else wanted
    try:
        tokenizer = get_tokenizer(name, vocab_dir=vocab_dir)
    except UserError as error:
        raise UserError(
            f"{error}; or give --vocab-size 50257, and tokens are shown as numbers"
        ) from error
    if notify is not None and wanted == "auto":
        notify("tokenizer: gpt2, whose ids token files hold unless --vocab-size says otherwise")
    return tokenizer


def _check_tokenizer(
    found: FoundFiles, wanted: Tokenizer, recorded: Tokenizer | None, vocab_size: int | None
) -> None:
    """Raise a UserError if the ids are known to belong to another tokenizer than the model's."""
    if vocab_size not in (None, wanted.vocab_size):
        raise UserError(
            f"--vocab-size {vocab_size}: the tokenizer {wanted.name} has {wanted.vocab_size} ids"
        )
    meta = _meta(found)
    if recorded is not None and recorded.fingerprint != wanted.fingerprint:
        said = f"of {recorded.name} {recorded.fingerprint}"
    elif recorded is None and meta is not None and wanted.name in ("gpt2", "bytes"):
        said = f"of a vocabulary of their own, as {meta} beside it says"
    else:
        return
    raise UserError(
        f"data: the ids of {found.all[0]} are {said}; the model's tokenizer is {wanted.name} "
        f"{wanted.fingerprint}"
    )


def _meta(found: FoundFiles) -> Path | None:
    """nanoGPT's pickle that describes a vocabulary, if there is one beside the files."""
    paths = (path.parent / NANOGPT_META for path in found.all)
    return next((path for path in paths if path.is_file()), None)
