"""Digests of everything that is generated, fixed before any method was trained on it.

Results from different days and machines are comparable only if world, tasks and splits are the same; a
change of a generator that alters one character fails the test that compares `compute_hashes` with this
table. World 0 belongs to the packaged model, world 1 to proofs that must not depend on world 0."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from .corpus import corpus, reading_order
from .tasks import TASKS

__all__ = ["compute_hashes", "frozen_hashes"]


def frozen_hashes() -> dict[str, str]:
    """Return the committed SHA-256 digests by name, such as ``world-0/pocket/word-problems/test``."""
    return {f"world-{seed}/{name}": digest for seed, table in _FROZEN.items() for name, digest in table.items()}


def compute_hashes(seed: int) -> dict[str, str]:
    """Generate everything about world `seed` anew and return its digests, named as in `frozen_hashes`.

    The digest of a list of rows is the SHA-256 of its rows as JSON lines (ASCII, sorted keys, no spaces).
    """
    lines = {d: _line({"prompt": d.prompt, "completion": d.completion}) for d in corpus(seed)}
    hashes = {
        f"world-{seed}/corpus": _digest(lines.values()),
        f"world-{seed}/reading-order": _digest(lines[d] for d in reading_order(seed)),
    }
    for task in TASKS.values():
        for split in task.splits:
            hashes[f"world-{seed}/{task.name}/{split}"] = _digest(map(_line, task.load(split, seed)))
    return hashes


def _line(row: Mapping[str, str]) -> bytes:
    return json.dumps(row, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _digest(lines: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line)
    return sha.hexdigest()


_FROZEN: dict[int, dict[str, str]] = {
    0: {
        "corpus": "cf954b57263f197028ee9089488eb8a6f0dda1e72e4ad77a05df73a075c0d8ba",
        "reading-order": "7fd4302374161786594eaec59c82311d62c993ebf066448f4031156ba67bfe0b",
        "pocket/word-problems/train": "ef0e3c5953997a924cd264c49aba9f8246575db12cb0ae8c6d8e4beea052f39e",
        "pocket/word-problems/validation": "56fb78dc8da4f2f035f5a687f210a76a23c8889b54381a5b74745a3fd3ec5eae",
        "pocket/word-problems/test": "904cdb9babc4607ff2aba69ef3c31b4715c1edcd3cdd758b6c6a74a1781c470b",
        "pocket/facts/train": "6d06936c4feddea5953af52cce1c0bfd753c444ee04037039ecc01984c5783bc",
        "pocket/facts/test": "bccc24baacf253b4ea2cd1d60c7d0512c49fc9d065e7b13145c7cf44e6e89919",
        "pocket/facts/paraphrase": "56132ed6fa2b63094b4d03fd40571237d625504ef5a9bc4f2bed52694d97d736",
        "pocket/arithmetic/train": "a8456eedaf0d285b4a98f105601d8ae4eadc08417174e88718269c733401730a",
        "pocket/arithmetic/validation": "7ae3ccff9b891d5d8fdbaf52fcea806c7bbf9153d1f203acc1044f2858e9631d",
        "pocket/arithmetic/test": "06d43fa9e0394ccab0cbbe5ea600cd7b68e1f8003dfefc4ecbc93044d35daac2",
        "pocket/corpus/train": "1067f16958bf9ae2f03309d851e0bb12ecdc81e674d5ec271fbeec7cff123c03",
        "pocket/corpus/test": "6a707ebade54138a9faecbf5040aa9a5ac49c49d0b12dbe7b60da9694b853cf8",
        "pocket/corpus/pretraining": "0f8deafda27d91571b56b4339edde864e2af0871c6f0edf518bc4bcd47f4d389",
    },
    1: {
        "corpus": "46b845f05603135dcf2f9105caf31a348c960175c5e4fb06747947539c46a9ee",
        "reading-order": "642b89e1b3bc44b5cc2304aef2171f6a807892967b47e757f0b69c84b8cc2965",
        "pocket/word-problems/train": "9e3de728543955ad840d5ea9f23b39e0d7da4bbb95e536cf06df911693f1362f",
        "pocket/word-problems/validation": "760d9ff8de7c159b3f821f0a5a244d82b13a7221ddd98ad251af7fee66970da3",
        "pocket/word-problems/test": "79a674fe8387240070216e6cea7e03524a4d4a83bb0dd1b690670a5478440364",
        "pocket/facts/train": "12acd6f72a4dec997582bd5e0e5d89bc1ef208d854e671096578a992d8143b3c",
        "pocket/facts/test": "038617a9ea1a194a566ab365388b2075ff9ad0ffc9fd356ba57881efde7a6535",
        "pocket/facts/paraphrase": "a78bd2139fdc024ecb177ab1006fefd51d3b99bf4e48851ccc04aa28c556240b",
        "pocket/arithmetic/train": "648a499bb9a2134d95fd26e8a8376f197edac3dfeff5773b3b4a88d26fda59c2",
        "pocket/arithmetic/validation": "48d685382eefafb0b6e4ba9a7defce96d0acf135d5465c98f536bb7ddd81e1e5",
        "pocket/arithmetic/test": "7ad499b91586720ddcfe6ab559ee9d0f2305fa60b45aa9a00cfe8fa5f61c807c",
        "pocket/corpus/train": "0d9707d19eb8e93d6a02afbba5f97906805ce37c306390a04029fb502dfc44ad",
        "pocket/corpus/test": "2fa8eeb05d71771dd9d49f07ec5b322fcf57ecb3c0dcaf6907e65588cc6ced45",
        "pocket/corpus/pretraining": "dda1d87d875fdbc1e80ac7bab06342dc9ade144b98261ba85de2c6a4b9cfb919",
    },
}
