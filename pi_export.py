"""
What a private inference engine should see of a model: few float32 matrices.

    python pi_export.py --ckpt=out/ckpt.pt --out=out/private

writes out/private/server.npz, the weights, which only the server may hold, and public.json, which
both parties hold: the configuration, the shape of every array, the tokenizer, and the size of what
enters a LayerNorm and of products, to a power of two. Nothing else in it was learned from data (but
by the shapes it tells which biases are zero and whether the FFN was folded). With
--embedding=public also embedding.npz for the client, who then looks its tokens up itself, for no
bytes and no time. It learns by it the embeddings and what is tied to them, the output matrix, but
for the final LayerNorm's gain and bias; or in a softmax-only model, folded, both but for one
unknown d x d matrix. By that and a revealed row of logits it also learns the last hidden row. The
prompt stays its own.

Under MPC a matrix product costs by its shape and every product of two secrets ends in a
truncation, so whatever algebra can do in the clear is done here, once, in float64:

- weight norm and spectral norm -> the plain weight they stand for
- LayerNorm's gain and bias -> the next matrix: (n g + b) W = n (diag(g) W) + b W
- 1 / sqrt(d_k), the unit of the logits, and a temperature per head -> W_Q
- the biases of K and V -> none, and the projection's: one moves a row of logits as a whole, the
  other goes through A, whose rows sum to 1
- W_in W_out, where nothing is between -> one d x d matrix, fused in training or not
- the whole FFN, alpha and beta too (eq. 8), where there is no LayerNorm and no activation ->
  nothing at all. It is X_SA W', W' = beta I + W_ffn / alpha, a change of basis, which the next
  block's matrices can be written in. A softmax-only model is attention alone,
  X_out = X + MHA(X), with two secret matrices to a block
- W_V W_O of a layer whose heads average, X + C X M, C_ij = 1/i for j <= i -> one d x d matrix M;
  several such layers in a row in a softmax-only model -> one product, see fold_run()
- the pattern of a layer that attends by position alone -> A itself (H, T, T), the server's

The temperature per query position (eq. 9) does not fold: row i of Q is divided by t_i, which no
matrix on the right of X does. Dividing Q, T x d numbers, is the cheapest exact place; the logits
are H x T x T.

private/block.py is the forward pass over those arrays, private/files.py reads and writes the files,
private/ranges.py refuses a model that fixed point would garble.
"""
from configurator import configure, die, end_on_signals, on_signals, one_of

if __name__ == "__main__":
    end_on_signals()

import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

try:
    from private.nonlinear import LOGIT_UNIT
except ImportError:
    die("jax is missing: it comes with spu, which needs Python 3.10 or 3.11; then "
        "pip install -r requirements.txt")
from model import GPT, PositionalAttention, UniformAttention, load_checkpoint  # noqa: E402
from private.files import write_files  # noqa: E402
from private.ranges import check_range  # noqa: E402

ckpt = "out/ckpt.pt"  # a checkpoint of train.py
out = "out/private"  # folder for server.npz, public.json and, of a public embedding, embedding.npz
embedding = "private"  # private | public: the client is given the embeddings, and looks up for free
pairs = True  # multiply two numbers in one: cheaper, and right up to four times what was tried
text = ""  # .bin of uint16 tokens to try ranges on; the val.bin of the training if empty


# ----------------------------------------------------------------------------------------- folding
def matrix(linear):
    """(W, b) of a torch Linear, float64 arrays with y = x W + b, norms resolved; b may be zeros."""
    W = linear.weight.detach().double().T
    if linear.bias is None:
        b = torch.zeros(W.shape[1], dtype=torch.float64)
    else:
        b = linear.bias.detach().double()
    return W.numpy(), b.numpy()


def after_norm(ln, W, b):
    """
    (W, b) that take a LayerNorm's bare normalised rows in place of its output; as they are if `ln`
    is the identity.
    """
    if isinstance(ln, torch.nn.Identity):
        return W, b
    gain, shift = gain_and_shift(ln)
    return gain[:, None] * W, shift @ W + b


def gain_and_shift(ln):
    """A LayerNorm's two vectors (d,) as float64 arrays."""
    return ln.weight.detach().double().numpy(), ln.bias.detach().double().numpy()


def ffn_scales(block, c):
    """(alpha, beta) of eq. 8; 1 where they aren't learned."""
    if c.learnable_ffn_scale:
        return block.alpha.item(), block.beta.item()
    return 1.0, 1.0


def ffn_matrix(block, c):
    """
    (W, b) of (1/alpha) FFN(n) = n W + b, of an FFN without activation: one d x d matrix whether it
    was trained fused or not. n: what follows a bare LayerNorm, if there is one.
    """
    alpha, _ = ffn_scales(block, c)
    if c.fuse_ffn:
        W, b = matrix(block.ffn.w_ffn)
    else:
        W_in, b_in = matrix(block.ffn.w_in)
        W_out, b_out = matrix(block.ffn.w_out)
        W = W_in @ W_out
        b = b_in @ W_out + b_out
    return after_norm(block.ln_2, W / alpha, b / alpha)


TINY = 1e-30  # so that 0 has a logarithm
STRETCH = 1e3  # of a basis: as much does rounding grow in it


def bases(blocks, c):
    """
    R_l (d, d), L + 1 of them: in a softmax-only model the residual stream before block l is
    written x = u R_l, and with R_l+1 = R_l W', W' = beta I + W_ffn / alpha, the FFN, which takes
    u R_l to u R_l W', leaves u as it is. R_L/2 = I, so that neither end is far from it. None if
    some R_l or its inverse stretches by STRETCH or more, which rounding would show: the FFN is
    then run.
    """
    products = [np.eye(c.n_embd)]
    for block in blocks:
        _, beta = ffn_scales(block, c)
        W, _ = ffn_matrix(block, c)
        products.append(products[-1] @ (beta * np.eye(c.n_embd) + W))
    middle = products[len(blocks) // 2]
    try:
        R = [np.linalg.solve(middle, product) for product in products]
        inverses = [np.linalg.inv(r) for r in R]
    except np.linalg.LinAlgError:
        return None
    stretch = max(np.linalg.norm(r, 2) for r in R + inverses)
    return R if stretch < STRETCH else None


def fold_attention(block, c):
    """
    (qkv, o, inverse_t): (W, b) of Q, K and V side by side, (W, b) of the projection, and one over
    the temperatures (H, T, 1) where there is one per position, else None.
    """
    d, d_k = c.n_embd, c.n_embd // c.n_head
    W_qk, b_qk = matrix(block.attn.qk)
    W_q, W_k = W_qk[:, :d], W_qk[:, d:]
    W_v, b_v = matrix(block.attn.v)
    W_o, b_o = matrix(block.attn.o)
    scale = np.full(d, 1 / (LOGIT_UNIT * math.sqrt(d_k)))  # of Q's columns
    inverse_t = None
    if c.learnable_temperature:
        inverse_t = 1 / block.attn.temperature.detach().double().numpy()  # (H, T) or (H, 1)
        if c.temperature_per_head:
            scale *= np.repeat(inverse_t, d_k)
            inverse_t = None
        else:
            inverse_t = inverse_t[:, :, None]
    W = np.hstack((W_q * scale, W_k, W_v))                          # (d, 3 d)
    b = np.hstack((b_qk[:d] * scale, b_qk[d:], b_v))                # (3 d,)
    W, b = after_norm(block.ln_1, W, b)
    b_o = b_o + b[2 * d:] @ W_o  # V's bias goes through A, whose rows sum to 1
    b[d:] = 0                    # and K's moves a row of logits as a whole
    return (W, b), (W_o, b_o), inverse_t


def fold_uniform(block):
    """
    (M, b) of the attention C n M + b of a uniform layer. n: what follows a bare LayerNorm, if there
    is one. Biases pass C unchanged, as its rows sum to 1.
    """
    W_v, b_v = matrix(block.attn.v)
    W_o, b_o = matrix(block.attn.o)
    return after_norm(block.ln_1, W_v @ W_o, b_v @ W_o + b_o)


def fold_positional(block, c):
    """
    "pattern", A (H, T, T) of a positional layer; "value", the matrix of V; "o", (W, b), with V's
    bias, as A's rows sum to 1.
    """
    W_v, b_v = after_norm(block.ln_1, *matrix(block.attn.v))
    W_o, b_o = matrix(block.attn.o)
    A = block.attn.pattern(c.block_size).detach().double().numpy()  # (H, T, T)
    return {"pattern": (A,), "value": (W_v,), "o": (W_o, b_v @ W_o + b_o)}


def attention_arrays(block, c):
    """
    "qkv" and "o", each (W, b), and maybe "inverse_t"; of a uniform layer "o" alone, fold_uniform's;
    of a positional one fold_positional's.
    """
    if isinstance(block.attn, UniformAttention):
        return {"o": fold_uniform(block)}
    if isinstance(block.attn, PositionalAttention):
        return fold_positional(block, c)
    qkv, o, inverse_t = fold_attention(block, c)
    arrays = {"qkv": qkv, "o": o}
    if inverse_t is not None:
        arrays["inverse_t"] = (inverse_t,)
    return arrays


def fold_block(block, c):
    """
    One block's arrays: attention_arrays(); "ffn", or "in" and "up", each W with its b; "beta" where
    that is learned; "inverse_t" (H, T, 1) where there is a temperature per position.
    """
    arrays = attention_arrays(block, c)
    alpha, beta = ffn_scales(block, c)
    if c.activation == "none":
        arrays["ffn"] = ffn_matrix(block, c)
    else:
        W_out, b_out = matrix(block.ffn.w_out)
        arrays["in"] = after_norm(block.ln_2, *matrix(block.ffn.w_in))
        arrays["up"] = W_out / alpha, b_out / alpha
    if c.learnable_ffn_scale:
        arrays["beta"] = (np.array(beta),)
    return named(arrays)


def fold_block_in_bases(block, c, R, R_next):
    """
    A softmax-only block's arrays in the bases before and after it: those of attention_arrays().
    x W = u (R W); x + y o + b_o, then b after W', is u + (y o + b_o) / R + b / R_next.
    """
    arrays = attention_arrays(block, c)
    inverse = np.linalg.inv(R)
    _, b_ffn = ffn_matrix(block, c)
    W_o, b_o = arrays["o"]
    arrays["o"] = W_o @ inverse, b_o @ inverse + b_ffn @ np.linalg.inv(R_next)
    # the matrix that x itself, or C x, goes into
    first = next(name for name in ("qkv", "value", "o") if name in arrays)
    W, *b = arrays[first]
    arrays[first] = R @ W, *b
    return named(arrays)


def evened(arrays, c):
    """
    A block's arrays with each head's Q and K of one size, to a power of two: Q is multiplied by
    what K is divided by. A product in pairs, see private/pairs.py, gives all columns the same bits.
    """
    if "qkv" not in arrays:
        return arrays
    d, d_k = c.n_embd, c.n_embd // c.n_head
    norm = np.linalg.norm(arrays["qkv"].reshape(d, 3, -1, d_k), axis=(0, 3))     # (3, H)
    q_size, k_size, _ = np.log2(norm + TINY)
    q = np.round((k_size - q_size) / 2)
    even = 2.0 ** np.repeat([q, -q, 0 * q], d_k, axis=1).ravel()                 # (3 d,)
    return arrays | {name: arrays[name] * even for name in ("qkv", "qkv_b")}


RUN = 3  # uniform layers to a product: its matrix is then as large as Q, K and V's, the largest


def fold_run(layers):
    """
    "o", [N_1; ...; N_m] (m d, d), and "o_b" (d,) of m uniform layers x + C x M_l + b_l in a row:

        X_m = X_0 + [C X_0, ..., C^m X_0] [N_1; ...; N_m] + b

    where N_j sums the products of all j of the M_l in their order, as C and an M commute. layers:
    [{"o": M_l, "o_b": b_l}].
    """
    d = len(layers[0]["o"])
    N, b = [np.eye(d)], np.zeros(d)
    for layer in layers:
        M = layer["o"]
        longer = [N_j + before @ M for N_j, before in zip([*N[1:], 0.0], N)]  # N_1 and so on
        N = [N[0], *longer]
        b = b + b @ M + layer["o_b"]
    return {"o": np.vstack(N[1:]), "o_b": b}


def named(pairs):
    """{name: (W, b) or (W,)} as {name: W, name_b: b}."""
    return {name + suffix: a for name, pair in pairs.items() for suffix, a in zip(("", "_b"), pair)}


def export(model, dtype=np.float32):
    """
    A trained GPT as named arrays: "wte" (V, d), "wpe" (T, d), "head" (d, V), "head_b" (V,), for
    each block "blocks.0.qkv" and so on, and "basis" (d, d) where a folded model has a final
    LayerNorm. Layers that fold_run() made one are named as the last of them.
    """
    c = model.config
    wte = model.wte.weight.detach().double().numpy()
    wpe = model.wpe.weight.detach().double().numpy()
    head, head_b = after_norm(model.ln_f, wte.T, np.zeros(len(wte)))
    softmax_only = not c.use_layernorm and c.activation == "none"
    R = bases(model.blocks, c) if softmax_only else None
    if R is None:
        blocks = [evened(fold_block(block, c), c) for block in model.blocks]
        return flat({"wte": wte, "wpe": wpe, "head": head, "head_b": head_b}, blocks, dtype)
    first = np.linalg.inv(R[0])
    top = {"wte": wte @ first, "wpe": wpe @ first, "head": head, "head_b": head_b}
    if c.final_layernorm:  # which wants x itself, x = u R_L
        top["basis"] = R[-1]
    else:
        top["head"] = R[-1] @ head
    blocks = [evened(fold_block_in_bases(block, c, *R[i:i + 2]), c)
              for i, block in enumerate(model.blocks)]
    uniform = min(c.uniform_layers, c.n_layer - 1)  # of the last layer one row is made: it is apart
    for start in range(0, uniform, RUN):
        run = blocks[start:min(start + RUN, uniform)]
        blocks[start:start + len(run)] = [{} for _ in run[1:]] + [fold_run(run)]
    return flat(top, blocks, dtype)


def flat(arrays, blocks, dtype):
    """
    One dict of the arrays and of each block's, as server.npz holds them. Biases that are zero
    throughout (a softmax-only model has one on Q alone) are left out.
    """
    arrays = dict(arrays)
    for i, block in enumerate(blocks):
        arrays |= {f"blocks.{i}.{name}": a for name, a in block.items()}
    kept = (name for name, a in arrays.items() if not name.endswith("_b") or np.any(a))
    return {name: np.asarray(arrays[name], dtype) for name in kept}


# ------------------------------------------------------------------------------- from a checkpoint
def write(model, tokenizer, folder, export=export, embedding="private", text=None, pairs=True):
    """
    server.npz, public.json and, if the embedding is public, embedding.npz, of a model, its arrays
    made by `export`. text: token ids to try ranges on; pairs: see above. Returns server.npz's
    arrays. Raises ValueError if a private run would garble the model, OSError if a file can't be
    written.
    """
    arrays = export(model)
    units, bits = check_range(model.config, arrays, text)
    write_files(folder, arrays, model.config, units, bits if pairs else {}, tokenizer, embedding)
    return arrays


def held_out_file(checkpoint):
    """The val.bin of a checkpoint's training, if it still lies there and is the same, or ""."""
    s = checkpoint.get("settings", {})
    folder = os.path.join(s.get("data_dir", "data"), s.get("dataset", ""))
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
            same = json.load(file)["sha256"] == checkpoint.get("data_sha256")
    except (OSError, ValueError, KeyError):
        return ""
    return os.path.join(folder, "val.bin") if same else ""


def held_out(path):
    """The tokens of a .bin of uint16, or None if path is empty. OSError if it can't be read."""
    if not path:
        return None
    try:
        return np.fromfile(path, np.uint16).astype(np.int64)
    except OSError as e:
        raise OSError(f"can't read held-out text {path}: {e.strerror}") from e


def leave(number, frame):
    """A signal's handler that raises, so that what write_whole() has begun is removed."""
    die(f"stopped by {signal.Signals(number).name}", 128 + number)


def main():
    on_signals(leave)
    configure(globals())
    one_of(globals(), embedding=("private", "public"))
    folder = os.path.expanduser(out)
    try:
        checkpoint = load_checkpoint(ckpt)
        model = GPT.from_checkpoint(checkpoint)
        tried = held_out(os.path.expanduser(text) or held_out_file(checkpoint))
        arrays = write(model, checkpoint.get("tokenizer"), folder, embedding=embedding, text=tried,
                       pairs=pairs)
    except (OSError, ValueError) as e:
        die(e)
    parameters = sum(p.numel() for p in model.parameters())
    numbers = sum(a.size for a in arrays.values())
    print(f"{model.config.name}: {parameters:,} parameters in {ckpt}")
    print(f"ranges tried on random tokens{'' if tried is None else ' and held-out text'}")
    print(f"{folder}/server.npz: the server's secret, {len(arrays)} arrays of {numbers:,} numbers "
          "(the embedding twice, as table and as head)")
    print(f"{folder}/public.json: for both parties, shapes and tokenizer")
    if embedding == "public":
        print(f"{folder}/embedding.npz: for the client, the embeddings")


if __name__ == "__main__":
    main()
