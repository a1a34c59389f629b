"""Quality and safety classifiers of one's own: logistic regression over hashed words and pairs of words.

A classifier learns from two sets of examples, what to keep and what not, and a document stays where the probability of
"keep" is at least the threshold. It is a folder: `weights.safetensors`, and `classifier.json` with the version, SHA-256 of
the weights and of the examples, and how it did on the tenth of the examples that it was not shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from gemmary.data import readers
from gemmary.data.sources import documents_at
from gemmary.data.words import Words
from gemmary.errors import GemmaryError

__all__ = ["Classifier", "ClassifierSettings", "train_classifier"]

_VERSION = 1
_BITS = 18
_FEWEST = 20
_TENTH = 10


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """A classifier: one that was saved, or examples to train one on."""

    name: str
    path: str | None = None
    """The folder of a saved classifier."""
    keep: str | None = None
    """Examples of what to keep: a JSON lines, Parquet or text file or folder."""
    remove: str | None = None
    """Examples of what to remove."""
    threshold: float = 0.5
    """A document stays where the probability of "keep" is at least this."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.keep is None) or (self.keep is None) != (self.remove is None):
            raise GemmaryError(f"classifier {self.name} needs either path, or both keep and remove")
        if not 0 <= self.threshold <= 1:
            raise GemmaryError(f"classifier {self.name}: threshold is {self.threshold}; it may be 0 to 1")


def _features(words: Words) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Buckets of words and pairs, and log(1 + count) of each, of length 1 together."""
    hashes = np.concatenate([words.normalised, words.shingles(2)]) >> np.uint64(64 - _BITS)
    buckets, counts = np.unique(hashes, return_counts=True)
    values = np.log1p(counts).astype(np.float32)
    return buckets.astype(np.int64), values / max(float(np.linalg.norm(values)), 1e-9)


class Classifier:
    """A trained classifier."""

    def __init__(self, weight: npt.NDArray[np.float32], bias: float, about: dict[str, Any]) -> None:
        self._weight, self._bias = weight, bias
        self.about = about
        """What `classifier.json` holds."""

    def score(self, words: Words) -> float:
        """The probability that this is to be kept."""
        buckets, values = _features(words)
        logit = float(self._weight[buckets] @ values) + self._bias
        return float(1 / (1 + np.exp(-np.clip(logit, -50, 50))))

    def save(self, folder: Path) -> None:
        """Write the two files."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self._weight, "bias": np.array([self._bias], np.float32)}
        data = safetensors.numpy.save(tensors)
        (folder / "weights.safetensors").write_bytes(data)
        about = self.about | {"weights_sha256": hashlib.sha256(data).hexdigest()}
        (folder / "classifier.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read the two files; what is missing, altered or of another version is a GemmaryError."""
        try:
            about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
            data = (folder / "weights.safetensors").read_bytes()
            version, digest = about["version"], about["weights_sha256"]
            if version != _VERSION:
                raise GemmaryError(
                    f"{folder} is a classifier of version {version}, and this reads {_VERSION}: train it again"
                )
            if hashlib.sha256(data).hexdigest() != digest:
                raise GemmaryError(
                    f"{folder}/weights.safetensors is not what classifier.json says: copy or train it again"
                )
            tensors = safetensors.numpy.load(data)
            weight, bias = tensors["weight"], float(tensors["bias"][0])
        except GemmaryError:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError, safetensors.SafetensorError) as error:
            raise GemmaryError(f"{folder} is not a saved classifier: {error}") from None
        if weight.shape != (1 << _BITS,) or weight.dtype != np.float32:
            raise GemmaryError(f"{folder} is not a saved classifier: its weight is {weight.dtype}{weight.shape}")
        return cls(weight, bias, about)


def train_classifier(settings: ClassifierSettings) -> Classifier:
    """A classifier from examples; the same examples give the same classifier."""
    with readers.needed("scikit-learn"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
    from scipy.sparse import csr_array

    rows, labels, digests = [], list[int](), {}
    for label, path in ((1, settings.keep), (0, settings.remove)):
        assert path is not None
        digest, count = hashlib.sha256(), 0
        for text in _examples(settings.name, path):
            digest.update(text.encode() + b"\0")
            rows.append(_features(Words(text)))
            labels.append(label)
            count += 1
        if count < _FEWEST:
            raise GemmaryError(
                f"classifier {settings.name}: {path} has {count} examples; at least {_FEWEST} are needed"
            )
        digests["keep" if label else "remove"] = {"examples": count, "sha256": digest.hexdigest()}
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in rows)])
    buckets, values = (np.concatenate(column) for column in zip(*rows, strict=True))
    matrix, target = csr_array((values, buckets, ends), shape=(len(rows), 1 << _BITS)), np.array(labels)
    unseen = np.random.Generator(np.random.Philox(0)).permutation(len(rows)) < len(rows) // _TENTH
    model = LogisticRegression(C=30.0, class_weight="balanced", max_iter=300)
    model.fit(matrix[np.flatnonzero(~unseen)], target[~unseen])
    scores = model.decision_function(matrix[np.flatnonzero(unseen)])
    both = len(set(target[unseen].tolist())) == 2
    about = {
        "format": "gemmary classifier", "version": _VERSION, "name": settings.name, "bits": _BITS, "examples": digests,
        "unseen": {
            "examples": int(unseen.sum()), "accuracy": round(float(((scores > 0) == target[unseen]).mean()), 4),
            "roc_auc": round(float(roc_auc_score(target[unseen], scores)), 4) if both else None,
        },
    }  # fmt: skip
    return Classifier(model.coef_[0].astype(np.float32), float(np.float32(model.intercept_[0])), about)


def _examples(name: str, path: str) -> Iterator[str]:
    return (found.text for found in documents_at(name, path) if isinstance(found, readers.Document))
