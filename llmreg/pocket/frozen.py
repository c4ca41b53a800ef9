"""Digests of everything that is generated, fixed before any result of a method was taken on it.

(Word problems, preferences and classification were fitted to what this model can learn in trials with plain
LoRA and PiSSA on world 0, and frozen then. The phrasings of reworded arithmetic were chosen by how often the pretrained
model is right, and frozen with a first trial of GRPO.)

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


def _line(row: Mapping[str, str | int]) -> bytes:
    return json.dumps(row, sort_keys=True, separators=(",", ":")).encode("ascii") + b"\n"


def _digest(lines: Iterable[bytes]) -> str:
    sha = hashlib.sha256()
    for line in lines:
        sha.update(line)
    return sha.hexdigest()


_FROZEN: dict[int, dict[str, str]] = {
    0: {
        "corpus": "4e045c4f05239f214e3bc2d2d59d1491035cc80ecc9da33ff7c453ed3ea1ca92",
        "reading-order": "e091951618d30daa61847deebadf85041bb4fbc3c29b2491ddfc96851b36b990",
        "pocket/word-problems/train": "91c78f873977dc6e5e507685a5198c2f23ad020e750022ab571504d3fcb86707",
        "pocket/word-problems/validation": "4bfb6acfd7053d8e63c41efcf3e3d57e7b872b3cb6249b3d186bfbc37a29f57a",
        "pocket/word-problems/test": "8c074f2bb9dd237ae0ec0eef12336ad02539043bf86db0c77a3a90ff5ef8a197",
        "pocket/facts/train": "6d06936c4feddea5953af52cce1c0bfd753c444ee04037039ecc01984c5783bc",
        "pocket/facts/test": "bccc24baacf253b4ea2cd1d60c7d0512c49fc9d065e7b13145c7cf44e6e89919",
        "pocket/facts/paraphrase": "56132ed6fa2b63094b4d03fd40571237d625504ef5a9bc4f2bed52694d97d736",
        "pocket/arithmetic/train": "cd4dd711aa94fa31d6cdb1ab640bf983dc0e26772e9271afc97e074b10e2f777",
        "pocket/arithmetic/validation": "e1ec1a51da82ce7c3f22b88334c2ffdde7cb8d51f9c7ae72c9b67680b15a7fb7",
        "pocket/arithmetic/test": "d6d74a6944a6673d662ff0024c23ad8284fdf5af466066c1b2a534f328faca0b",
        "pocket/reworded-arithmetic/train": "3a2aaec83f829d99a8742163aea21d78daf3f538841fcf096193267ab0478393",
        "pocket/reworded-arithmetic/validation": "56526e6ac7011c6ed9b06e2500db691f6b20cea9c87440c82328757898aa039b",
        "pocket/reworded-arithmetic/test": "8e980a63df676b539bcb9a6750e5925e792fa9b926c01d1e3585e31cb2fab16a",
        "pocket/corpus/train": "1067f16958bf9ae2f03309d851e0bb12ecdc81e674d5ec271fbeec7cff123c03",
        "pocket/corpus/test": "6a707ebade54138a9faecbf5040aa9a5ac49c49d0b12dbe7b60da9694b853cf8",
        "pocket/corpus/pretraining": "820f283a4ba3e00e1224d1bfe9e4292cadccb17f49f3f40c13886bbc4f97e353",
        "pocket/preferences/train": "bf1115dedfdb620e524d20a134a7f6378741e440c9eb4f2edbe62f320de755f4",
        "pocket/preferences/validation": "71229b4d5df700ff524185c719e82e9e05484dd35ce0d3827a8ed2e347832615",
        "pocket/preferences/test": "fcbedcc5add490f3bebbb85edcd522dd48a18487486cc7b0eaebcd7f3cb7935d",
        "pocket/classification/train": "fa3fa2d9d0a9755beec28b82194e2cdb3b5ba367b62600e95ef7ca6ee33ed0b0",
        "pocket/classification/validation": "660c65b13d7a98c892612ac979426119225032da20e83ea1333e1de5f4cba5cd",
        "pocket/classification/test": "d35d36e9c5062963e734fb837aa77a96846433ea3e443f52362c7aabc3037c27",
    },
    1: {
        "corpus": "02d1d4fdde84310f634331e2eee527bb3bf292a60f02896623f83997a3fd281a",
        "reading-order": "7ce62a0d89248b601d593bb35c4e34497ac38cd42e568ba8492aa0c1a2191633",
        "pocket/word-problems/train": "8cfa6422cb4de0323620e617180f19b48a31d132cdf94e47c6ce4fecfd668788",
        "pocket/word-problems/validation": "88ea5b53df22835119439eedb0096c9bc2d392866349b9a0c7a9197bbf36829c",
        "pocket/word-problems/test": "b5b3629c04e04bc67571c2fe41727e8d73db112bf1af1dd43ab2f8fae5ddaa72",
        "pocket/facts/train": "12acd6f72a4dec997582bd5e0e5d89bc1ef208d854e671096578a992d8143b3c",
        "pocket/facts/test": "038617a9ea1a194a566ab365388b2075ff9ad0ffc9fd356ba57881efde7a6535",
        "pocket/facts/paraphrase": "a78bd2139fdc024ecb177ab1006fefd51d3b99bf4e48851ccc04aa28c556240b",
        "pocket/arithmetic/train": "c38b2f97e22e208b4c018058afd4118b4be613f1567d452db2b42e804fa7069e",
        "pocket/arithmetic/validation": "9a6bf1200fd6442a30a57871aac902e9292ade5b51fad974fcbfd95a6c89d931",
        "pocket/arithmetic/test": "c72bceb94d3481e3edbe783b38d779557e4fe3ad234a27f266afa3fe5dd30831",
        "pocket/reworded-arithmetic/train": "28d44474901da0d64e2b60ad804d9f346b24af7cd94267a613c7304390c3c09e",
        "pocket/reworded-arithmetic/validation": "aa8fe8f5005712c509023be35f98eeb7417d847b8533647a5c2bab8dd05e7184",
        "pocket/reworded-arithmetic/test": "07d77f1d66c688c8acddcbedf4bf1f9947becde2cd315d236ec819f6b43bfa68",
        "pocket/corpus/train": "0d9707d19eb8e93d6a02afbba5f97906805ce37c306390a04029fb502dfc44ad",
        "pocket/corpus/test": "2fa8eeb05d71771dd9d49f07ec5b322fcf57ecb3c0dcaf6907e65588cc6ced45",
        "pocket/corpus/pretraining": "290ce1c322d78da7f7fd3198e634f20c9c08877be77d292830127ed86a7d7a85",
        "pocket/preferences/train": "ed38186fa1b92eb33d8eb7356195119b553b23af82cc72f7944e0e6aaafa7a95",
        "pocket/preferences/validation": "db568d70e048ea81fabaab6f98a69570ecec8eb14f05d1e8a8ca3455c69d0d63",
        "pocket/preferences/test": "d5fbac8bdb5a38ed501488d1850de33eca0bc52296d902bd1b813e8948a400c6",
        "pocket/classification/train": "fe789c8d56079fb1d8362d4e9368d3722994639be5744d02bd17c186d59ef049",
        "pocket/classification/validation": "0d4b797730c26e1bd9368d4fe4faff07d7463f686f85e17ca586667b0f625720",
        "pocket/classification/test": "6b0dd71fe41032901e6d3fbd9ad67aebb1bd139d2298e94019ae0a87f0417599",
    },
}
