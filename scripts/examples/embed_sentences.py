"""Embed sentences with all-MiniLM-L6-v2, and find those nearest to a question: ``embed_sentences.py FILE QUESTION``.

FILE has a sentence in each line.  Run it with ``scripts/setup cpu models && .venv/bin/python
scripts/examples/embed_sentences.py CHANGELOG.md 'What happens when a process dies?'``
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `scripts`
from scripts.examples.shell import needs, run

with needs("cpu", "models"):
    import numpy as np
    from scripts import minilm

    import trtpool

NEAREST = 5
Tokens = Mapping[str, "npt.NDArray[Any]"]


def start_pool(folder: Path) -> trtpool.Pool:
    """A pool that takes sentences of any number of tokens."""
    model = minilm.write_model(folder / "minilm.onnx")
    sizes = dict.fromkeys(minilm.INPUTS, ((1, minilm.LONGEST),))
    return trtpool.Pool(model, shapes=sizes, slots=64, max_batch=4)


def write(tokens: Tokens, inputs: Any) -> None:
    """Write a sentence into a slot, which takes the shape of what is written."""
    for name, array in tokens.items():
        inputs[name] = array


def embed(pool: trtpool.Client, sentences: Iterable[str]) -> npt.NDArray[np.float32]:
    """A vector of length 1 for each sentence, ``(sentences, 384)``."""
    encodings = minilm.load_tokenizer().encode_batch(list(sentences))
    vectors = np.empty((len(encodings), minilm.WIDTH), np.float32)
    # Sentences of one length share batches, without padding, so those come one after the other.
    order = sorted(range(len(encodings)), key=lambda number: len(encodings[number].ids))
    tokens = (minilm.inputs_of(encodings[number]) for number in order)
    for number, (_, result) in zip(order, pool.map(write, tokens), strict=True):
        vectors[number] = result.outputs["sentence_embedding"]
    return vectors


def main() -> int:
    """Run the example and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("question")
    options = parser.parse_args()
    sentences = [line.strip() for line in options.file.read_text().splitlines() if line.strip()]
    with tempfile.TemporaryDirectory(prefix="trtpool-minilm-") as folder, start_pool(Path(folder)) as pool:
        *vectors, question = embed(pool, [*sentences, options.question])
        (model,) = pool.status().models
    print(f"{len(sentences)} sentences and the question, in {model.batches} batches; nearest to {options.question!r}:")
    nearness = np.array(vectors) @ question if vectors else np.empty(0)
    for number in np.argsort(-nearness)[:NEAREST]:
        print(f"{nearness[number]:6.2f}  {sentences[number]}")
    return 0


if __name__ == "__main__":
    run(__file__, main)
