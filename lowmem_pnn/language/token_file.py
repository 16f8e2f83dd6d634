"""Files of tokens, one number after the other without a header, as other programs write them: `tokens:FILE.bin,dtype=uint16`."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.language.tokenizer import open_tokenizer
from lowmem_pnn.sources.dataset import Dataset, folder_name
from lowmem_pnn.sources.targets import PYTORCH_IGNORED, Targets
from lowmem_pnn.sources.text import DEFAULT_CONTEXT, TextSplit, TokenFile

_TYPES = ("uint8", "uint16", "uint32", "int32", "int64")
_OPTION = re.compile(r",(\w+)=([^,=]*)$")
_CHUNK_BYTES = 1 << 20


def open_token_file(place: str, context: int | None, tokenizer: str | None) -> Dataset:
    """Open a file of tokens, and read it once.

    Args:
        place: Path of the file, with `,dtype=TYPE` behind it (uint16 where it is left out), and `,vocab=N`, the number of tokens that
            there are; where it is left out, the tokenizer's, or one more than the largest in the file.
        context: Tokens of a window; None for 256.
        tokenizer: Tokenizer that the tokens are of; None where nobody says.

    Returns:
        Windows of the file, without a test part.

    Raises:
        ConfigError: An option that there is not.
        DataError: There is no such file, it is too short, or a number is no token.
    """
    path, dtype, vocabulary = _parse(place)
    context = context or DEFAULT_CONTEXT
    reader = None if tokenizer is None else open_tokenizer(tokenizer)
    if vocabulary is None and reader is not None:
        vocabulary = reader.size
    file = TokenFile(path, dtype, "tokens")
    count = len(file.tokens)
    if file.size % dtype.itemsize:
        raise DataError(
            f"tokens {str(path)!r} has {file.size:,} bytes, no whole number of {dtype.name} ({dtype.itemsize} each); give its dtype"
        )
    if count < context + 1:
        remedy = f"a longer file, or --context {count - 1} at most" if count > 1 else "a longer file"
        raise DataError(
            f"tokens {str(path)!r} {f'has {count:,} tokens' if count else 'is empty'}; a window of {context} tokens and the token after it are "
            f"{context + 1:,}; give {remedy}"
        )
    least, most, digest = 0, 0, hashlib.sha256(f"{dtype.name} {context}".encode())
    step = _CHUNK_BYTES // dtype.itemsize
    for begin in range(0, count, step):
        chunk = file.tokens[begin : begin + step]
        least, most = min(least, int(chunk.min())), max(most, int(chunk.max()))
        digest.update(chunk.data)
    if least < 0:
        raise DataError(f"tokens {str(path)!r} holds {least}, and tokens are numbers from 0; give its dtype")
    if vocabulary is not None and most >= vocabulary:
        raise DataError(
            f"tokens {str(path)!r} holds token {most:,}, and there are {vocabulary:,}; give its dtype, or a larger vocab=N"
        )
    num_windows = (count - 1) // context
    preparation: dict[str, Any] = {"context": context}
    if reader is not None:
        preparation |= {"tokenizer": tokenizer, "tokenizer_fingerprint": reader.fingerprint}
    return Dataset(
        name=folder_name(path.stem),
        train=TextSplit(file, context, 0, num_windows),
        test=None,
        targets=Targets("tokens", vocabulary or most + 1, (context,), ignored=PYTORCH_IGNORED),
        sample_shape=(context,),
        dtype=torch.int64,
        preprocessing=f"{count:,} tokens ({dtype.name}), windows of {context} with the token after each as its label",
        fingerprint=digest.hexdigest(),
        preparation=preparation,
    )


def _parse(place: str) -> tuple[Path, np.dtype[Any], int | None]:
    options: dict[str, str] = {}
    while (found := _OPTION.search(place)) is not None and not Path(place).exists():
        name, value = found.groups()
        if name not in ("dtype", "vocab"):
            raise ConfigError(f"data tokens:{place} has no option {name!r}; write tokens:FILE,dtype=uint16,vocab=N")
        options.setdefault(name, value)
        place = place[: found.start()]
    dtype = options.get("dtype", "uint16")
    if dtype not in _TYPES:
        raise ConfigError(f"data tokens:{place}: dtype {dtype!r} is none of {', '.join(_TYPES)}")
    vocabulary = options.get("vocab")
    if vocabulary is not None and not (vocabulary.isdecimal() and int(vocabulary)):
        raise ConfigError(f"data tokens:{place}: vocab={vocabulary} is no number of tokens; give one from 1")
    return Path(place).expanduser(), np.dtype(dtype), None if vocabulary is None else int(vocabulary)
