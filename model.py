"""
The GPT of "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489), whole, in one file.

Notable features:
- GPT-2: decoder-only, pre-LN, learned positions, tied input and output embeddings, no dropout
- a flag for every nonlinearity (LayerNorm, GELU, ReLU; softmax in the first layers) and for every
  replacement of the paper: fused FFN, learnable FFN scales (eq. 8), learnable softmax temperatures
  (eq. 9), weight / spectral norm
- biases where the paper's code base has them: on Q, K and LayerNorm; none on V, the output
  projection and the FFN
- first layers whose heads average, if wanted, or attend by position alone: no softmax of the text
- attention entropies of every layer, head and query position, in nats, when asked for
- counts its own nonlinear operations and FLOPs, as the paper's tables do

Written (B, T, d) = (batch, context, n_embd), H = n_head, L = n_layer, V = vocab_size, d_k = d / H.
"""
import math
import os
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

from entropy import attention_entropy, attention_with_entropy, causal_average
from gpt2 import read_gpt2

NORM_PLACES = ("none", "qk", "ffn", "qk+ffn", "qkv+ffn", "qkvo+ffn")  # the columns of Table 4

# The FFN's activations: the letter in the paper's names, and the function. To add your own:
# 1. its flag in GPTConfig, such as `use_silu: bool = False  # S: SiLU in the FFN`;
# 2. its entry here, `"silu": ("S", nn.SiLU())`, and --use_gelu=False --use_silu=True trains it;
# 3. for private inference, its secure form beside the others in private/nonlinear.py.
ACTIVATIONS = {
    "gelu": ("G", nn.GELU()),
    "gelu_tanh": ("G", nn.GELU("tanh")),  # what use_gelu means under the flag gelu_tanh
    "relu": ("R", nn.ReLU()),
    "none": ("", nn.Identity()),
}


class Gain(nn.Module):
    """A learned number that scales a matrix."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, weight):
        return self.gain * weight


def sigma_reparam(layer):
    """W = gain * V / sigma(V): sigmaReparam's bound on the logits, which softmax alone lacks."""
    parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", Gain())


# Reparametrizations of the linears: the flag, the paper's name, and what does it. All of them are
# gone once the weights are exported.
NORMS = {
    "weight_norm": ("WNorm", parametrizations.weight_norm),
    "spectral_norm": ("SNorm", parametrizations.spectral_norm),
    "sigma_reparam": ("SReparam", sigma_reparam),
}


@dataclass
class GPTConfig:
    block_size: int = 128  # T, the context length
    vocab_size: int = 4096  # V
    n_layer: int = 6  # L
    n_head: int = 6  # H
    n_embd: int = 192  # d
    use_layernorm: bool = True  # LN: before attention and before the FFN of every block
    final_layernorm: bool = True  # ln_f, before the vocabulary: most likely also in the paper's SM
    use_gelu: bool = True  # G: GELU in the FFN
    use_relu: bool = False  # R: ReLU in the FFN
    fuse_ffn: bool = False  # Fu: one d x d matrix for W_in W_out, which nothing nonlinear separates
    learnable_ffn_scale: bool = False  # Sc: alpha and beta per layer, eq. 8
    learnable_temperature: bool = False  # SM(t): one per head and query position, eq. 9
    temperature_per_head: bool = False  # SM(th): one per head, not the paper's; folds into W_Q
    temperature_init: float = 1e-2  # where t starts (the paper: 1e-2 CodeParrot, 1e-1 Languini)
    weight_norm: str = "none"  # linears under weight norm: qk, ffn, qk+ffn, qkv+ffn, qkvo+ffn
    spectral_norm: str = "none"  # linears under spectral norm, likewise
    sigma_reparam: str = "none"  # spectral norm times a learned gain (arXiv 2303.06296), likewise
    bias: bool = False  # biases also on V, output projection and FFN, as OpenAI's GPT-2 has them
    gelu_tanh: bool = False  # GELU by its tanh approximation, OpenAI's GPT-2's; slower on a CPU
    uniform_layers: int = 0  # the first so many average what a position sees: no softmax, Q, K
    positional_layers: int = 0  # the next so many attend by a learned pattern of distances alone

    def __post_init__(self):
        """Refuse what cannot be built. Raises ValueError with a sentence."""
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{field.name} must be {kind.__name__}, and is {value!r}")
        for key, (least, most) in LIMITS.items():
            if not least <= getattr(self, key) <= most:  # nor is NaN
                raise ValueError(f"{key} must be at least {least} and at most {most}, "
                                 f"and is {getattr(self, key)}")
        if not 0 <= self.uniform_layers <= self.n_layer:
            raise ValueError(f"uniform_layers must be at least 0 and at most n_layer={self.n_layer}"
                             f", and is {self.uniform_layers}")
        if not 0 <= self.positional_layers <= self.n_layer - self.uniform_layers:
            raise ValueError("positional_layers must be at least 0, and with uniform_layers at "
                             f"most n_layer={self.n_layer}, and is {self.positional_layers}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} cannot be split among {self.n_head} heads")
        flags = [f"use_{name}" for name in self.activations]
        if len(flags) > 1:
            raise ValueError(f"{' and '.join(flags)} are both on: the FFN has one activation")
        if self.fuse_ffn and flags:
            raise ValueError(f"fuse_ffn needs an FFN without activation: set {flags[0]}=False")
        for key in NORMS:
            if getattr(self, key) not in NORM_PLACES:
                places = ", ".join(NORM_PLACES)
                raise ValueError(f"{key} must be one of {places}, and is {getattr(self, key)!r}")
        norms = [key for key in NORMS if getattr(self, key) != "none"]
        if len(norms) > 1:
            raise ValueError(f"{' and '.join(norms)} are both on: choose one")
        if self.temperature_per_head and not self.learnable_temperature:
            raise ValueError("temperature_per_head needs learnable_temperature=True")

    @property
    def activations(self):
        """The names in ACTIVATIONS whose flag is on: at most one in a config that can be built."""
        return [name for name in ACTIVATIONS if getattr(self, f"use_{name}", False)]

    @property
    def activation(self):
        """The FFN's activation, a key of ACTIVATIONS; "none" for a linear FFN."""
        name = self.activations[0] if self.activations else "none"
        return "gelu_tanh" if name == "gelu" and self.gelu_tanh else name

    @property
    def softmax_layers(self):
        """How many layers, the last ones, take a softmax of the text."""
        return self.n_layer - self.uniform_layers - self.positional_layers

    @property
    def name(self):
        """The paper's name of this architecture (Table 1), such as SM+LN+G or SM(t)+ScFuFFN."""
        parts = ["SM"]
        if self.learnable_temperature:
            parts = ["SM(th)" if self.temperature_per_head else "SM(t)"]
        if self.use_layernorm:
            parts.append("LN")
        if self.activation != "none":
            parts.append(ACTIVATIONS[self.activation][0])
        scaled = "Sc" if self.learnable_ffn_scale else ""
        fused = "Fu" if self.fuse_ffn else ""
        if scaled or fused:
            parts.append(f"{scaled}{fused}FFN")
        for key, (name, _) in NORMS.items():
            if getattr(self, key) != "none":
                parts.append(f"{name}({getattr(self, key).upper()})")
        parts = ["+".join(parts)]
        for kind in ("uniform", "positional"):
            if count := getattr(self, f"{kind}_layers"):
                plural = "" if count == 1 else "s"
                parts.append(f"{count} {kind} layer{plural}")
        if not self.final_layernorm:
            parts.append("no ln_f")
        return ", ".join(parts)


# Sizes beyond these are a slip of the keyboard or a hostile file, and would end in endless memory.
LIMITS = {"block_size": (1, 2**20), "vocab_size": (1, 2**24), "n_layer": (1, 2**10),
          "n_head": (1, 2**16), "n_embd": (1, 2**16), "temperature_init": (1e-6, 1e6)}


def linear(c, d_in, d_out, part, bias):
    """
    A Linear initialised N(0, 0.02), under that one of NORMS which c has on, where it covers `part`:
    "qk", "v", "o" or "ffn".
    """
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    for key, (_, normalise) in NORMS.items():
        place = getattr(c, key)
        if place != "none" and any(part in covered for covered in place.split("+")):
            normalise(layer)
    return layer


def choose(logits, temperature=1.0, top_k=0, generator=None):
    """
    A token (B, 1) for each row of logits (B, V): from the top_k likeliest (0: all), at a softmax
    `temperature` over the vocabulary (below 1e-5: always the likeliest).
    """
    if temperature < 1e-5:
        return logits.argmax(-1, keepdim=True)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities = F.softmax(logits / temperature, -1)
    return torch.multinomial(probabilities, 1, generator=generator)


def layernorm(used, c):
    return nn.LayerNorm(c.n_embd) if used else nn.Identity()


def extended(cache, key, new):
    """What cache[key] holds and `new` after it, along the positions (dimension 2): kept there."""
    cache[key] = torch.cat((cache[key], new), 2) if key in cache else new
    return cache[key]


class Attention(nn.Module):
    """Causal multi-head attention, eq. 3 and 6, with the learnable temperature of eq. 9."""

    with_entropy = staticmethod(attention_with_entropy)  # what computes it, if the entropy is asked

    def __init__(self, c):
        super().__init__()
        d = c.n_embd
        self.n_head = c.n_head
        self.qk = linear(c, d, 2 * d, "qk", bias=True)  # W_Q and W_K side by side
        self.v = linear(c, d, d, "v", bias=c.bias)
        self.o = linear(c, d, d, "o", bias=c.bias)
        if c.learnable_temperature:
            # log t is what is learned: t stays positive whatever the optimizer does
            shape = (c.n_head, 1 if c.temperature_per_head else c.block_size)
            self.log_temperature = nn.Parameter(torch.full(shape, math.log(c.temperature_init)))

    @property
    def temperature(self):
        """t, (H, block_size), or (H, 1) with temperature_per_head; always positive."""
        return self.log_temperature.exp()

    def forward(self, x, return_entropy=False, cache=None):
        """
        x (B, T, d) -> y (B, T, d), and the entropy (B, H, T) in nats if asked for, else None.
        cache: see GPT.forward.
        """
        B, T, d = x.shape
        q, k = self.qk(x).split(d, dim=-1)  # (B, T, d) each
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, self.v(x)))
        if cache is not None:
            k, v = extended(cache, "k", k), extended(cache, "v", v)  # (B, H, past + T, d_k)
        past = v.shape[2] - T
        if hasattr(self, "log_temperature") and past:
            i = min(past, self.temperature.shape[1] - 1)  # of a position, or the head's only one
            q = q / self.temperature[:, i, None, None]
        elif hasattr(self, "log_temperature"):  # row i of the logits over t_i is q_i over t_i
            q = q / self.temperature[:, :T, None]
        # On a CPU softmax wants float32, and scaled_dot_product_attention is slower in 16 bits.
        with torch.autocast("cpu", enabled=False):
            if past:  # the one token here may look at all of them
                y, entropy = F.scaled_dot_product_attention(q, k, v), None
            elif return_entropy:
                y, entropy = self.with_entropy(q, k, v)
            else:
                if v.dtype.itemsize == 2 and v.device.type == "cpu":
                    q, k, v = q.float(), k.float(), v.float()
                y, entropy = F.scaled_dot_product_attention(q, k, v, is_causal=True), None
        return self.o(y.transpose(1, 2).reshape(B, T, d)), entropy


def causal_mean(x):
    """C x, C_ij = 1/i for j <= i: row i of x (..., T, n) becomes the mean of the rows up to it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    count = torch.arange(1, x.shape[-2] + 1, device=x.device, dtype=wide)
    return (x.cumsum(-2, dtype=wide) / count[:, None]).to(x.dtype)


class UniformAttention(nn.Module):
    """
    Attention of the largest entropy that a causal head can have, log i in row i: A = C in every
    head, C_ij = 1/i for j <= i. C is public and the same for all, so that

        MHA(X) = C X M,  M = sum over the heads of W_V W_O

    needs no Q, K, temperature or softmax; under MPC C X is local, and C X M one secret product.
    W_V and W_O stay apart, as trained.
    """

    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.v = linear(c, c.n_embd, c.n_embd, "v", bias=c.bias)
        self.o = linear(c, c.n_embd, c.n_embd, "o", bias=c.bias)

    def pattern(self, T):
        """A, (H, T, T): C for every head."""
        return causal_average(T).expand(self.n_head, T, T)

    def forward(self, x, return_entropy=False, cache=None):
        """Attention.forward(), whose arguments these are."""
        B, T, d = x.shape
        v = self.v(x)[:, None]  # (B, 1, T, d), as all heads are alike
        if cache is not None:
            v = extended(cache, "v", v)  # (B, 1, past + T, d)
        y = causal_mean(v)[:, 0, -T:]  # (B, T, d)
        entropy = None
        if return_entropy:
            wide = torch.promote_types(x.dtype, torch.float32)
            entropy = torch.arange(1, T + 1, device=x.device, dtype=wide).log()
            entropy = entropy.expand(B, self.n_head, T)
        return self.o(y), entropy


class PositionalAttention(nn.Module):
    """
    Attention by position alone: A(h)_ij is the softmax over j <= i of r(h, i - j), a learned number
    for each head and distance, 0 at first, so that it starts as UniformAttention. That softmax is
    of weights and not of the text: under MPC their owner takes it in the clear, and A V is a
    product of a private matrix by a secret one.
    """

    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.v = linear(c, c.n_embd, c.n_embd, "v", bias=c.bias)
        self.o = linear(c, c.n_embd, c.n_embd, "o", bias=c.bias)
        self.by_distance = nn.Parameter(torch.zeros(c.n_head, c.block_size))

    def pattern(self, T):
        """A, (H, T, T), causal, float32 or wider."""
        i = torch.arange(T, device=self.by_distance.device)
        distance = i[:, None] - i                                      # (T, T)
        r = self.by_distance[:, distance.clamp(min=0)]                 # (H, T, T)
        return r.masked_fill(distance < 0, float("-inf")).softmax(-1)  # (H, T, T)

    def forward(self, x, return_entropy=False, cache=None):
        """Attention.forward(), whose arguments these are."""
        B, T, d = x.shape
        v = self.v(x).view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, d_k)
        if cache is not None:
            v = extended(cache, "v", v)                            # (B, H, past + T, d_k)
        A = self.pattern(v.shape[2])[:, -T:]                       # (H, T, past + T)
        entropy = attention_entropy(A).expand(B, -1, -1) if return_entropy else None
        y = A.to(v.dtype) @ v                                      # (B, H, T, d_k)
        return self.o(y.transpose(1, 2).reshape(B, T, d)), entropy


class FFN(nn.Module):
    """act(x W_in) W_out (eq. 4), or x W_ffn when fused."""

    def __init__(self, c):
        super().__init__()
        d = c.n_embd
        if c.fuse_ffn:
            self.w_ffn = linear(c, d, d, "ffn", c.bias)
        else:
            self.w_in = linear(c, d, 4 * d, "ffn", c.bias)
            self.w_out = linear(c, 4 * d, d, "ffn", c.bias)
            self.act = ACTIVATIONS[c.activation][1]

    def forward(self, x):
        return self.w_ffn(x) if hasattr(self, "w_ffn") else self.w_out(self.act(self.w_in(x)))


class Block(nn.Module):
    """
    X_SA = X + MHA(LN(X)); X_out = beta X_SA + (1/alpha) FFN(LN(X_SA)): eq. 1 and 8, with
    alpha = beta = 1 where they are not learned.
    """

    def __init__(self, c, attention):
        super().__init__()
        self.ln_1 = layernorm(c.use_layernorm, c)
        self.ln_2 = layernorm(c.use_layernorm, c)
        self.attn = attention(c)
        self.ffn = FFN(c)
        if c.learnable_ffn_scale:
            self.alpha = nn.Parameter(torch.ones(()))
            self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x, return_entropy=False, cache=None):
        y, entropy = self.attn(self.ln_1(x), return_entropy, cache)
        x = x + y
        y = self.ffn(self.ln_2(x))
        return (self.beta * x + y / self.alpha if hasattr(self, "alpha") else x + y), entropy


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)  # also the output matrix
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        kinds = [UniformAttention] * c.uniform_layers
        kinds += [PositionalAttention] * c.positional_layers
        kinds += [Attention] * c.softmax_layers
        self.blocks = nn.ModuleList(Block(c, attention) for attention in kinds)
        self.ln_f = layernorm(c.final_layernorm, c)

    def forward(self, idx, targets=None, return_entropy=False, cache=None):
        """
        idx: (B, T) token ids below V, T <= block_size; targets: (B, T), -1 where there is nothing
        to predict. cache: L dicts for generate(), where the first call with them, empty, leaves its
        keys and values; each later call is of one token more.

        Returns logits (B, T, V); the mean cross-entropy in nats, None without targets; and, if
        return_entropy, the attention entropies (L, B, H, T) in nats, else None. Raises ValueError
        if T exceeds block_size.
        """
        T = idx.shape[1]
        past = cache[0]["v"].shape[2] if cache and cache[0] else 0
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens do not fit into "
                             f"block_size={self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[past:past + T]  # (B, T, d)
        entropies = []
        for block, kept in zip(self.blocks, cache or [None] * len(self.blocks)):
            x, entropy = block(x, return_entropy, kept)
            entropies.append(entropy)  # (B, H, T)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss, torch.stack(entropies) if return_entropy else None

    def param_groups(self, weight_decay):
        """
        AdamW groups: decay on embeddings and matrices; none on biases, LayerNorms, gains,
        temperatures, alpha and beta.
        """
        def decays(name):
            # .original1 is the matrix under weight norm, whose gain is .original0, and .original
            # the matrix under spectral norm
            matrix = name.endswith((".weight", ".original", ".original1"))
            return matrix and ".ln_" not in f".{name}"

        named = dict(self.named_parameters())
        matrices = [p for name, p in named.items() if decays(name)]
        others = [p for name, p in named.items() if not decays(name)]
        return [{"params": matrices, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0}]

    def nonlinear_ops(self):
        """
        Nonlinear operations of one forward pass over T = block_size tokens, {kind: (how many,
        shape of each)}: the "#Nonlinear Ops" column of Tables 2, 3, 6 and 7. Kinds SM, LN, G, R.
        As there, the final LayerNorm isn't counted.
        """
        c = self.config
        ops = {"SM": (c.softmax_layers * c.n_head, (c.block_size, c.block_size))}
        if c.use_layernorm:
            ops["LN"] = (2 * c.n_layer, (c.block_size, c.n_embd))
        if c.activation != "none":
            ops[ACTIVATIONS[c.activation][0]] = (c.n_layer, (c.block_size, 4 * c.n_embd))
        return ops

    def flops(self):
        """
        FLOPs of one forward pass over T = block_size tokens as the paper's tables count them:
        {"ffn": , "attn": }. Q K^T counts whole, A V only its causal half; embedding and vocabulary
        projection are left out, and so is a positional layer's softmax, taken once of weights. An
        average counts an addition and a division for each number.
        """
        c = self.config
        L, T, d = c.n_layer, c.block_size, c.n_embd
        softmax = 2 * T * 4 * d * d + 3 * T * T * d
        uniform = 2 * T * 2 * d * d + 2 * T * d
        positional = 2 * T * 2 * d * d + T * T * d
        attn = (c.softmax_layers * softmax + c.uniform_layers * uniform
                + c.positional_layers * positional)
        return {"ffn": L * 2 * T * d * d * (1 if c.fuse_ffn else 8),
                "attn": attn}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
        """
        Sample max_new_tokens after idx (B, T), each by choose(). Returns (B, T + max_new_tokens).
        Raises ValueError if idx is empty or has a token that V lacks.

        Keys and values are kept as long as all fits into block_size. From there on the context is
        the last block_size tokens, at positions that count from its start: every token moves every
        position, and takes a whole pass.
        """
        if idx.numel() == 0:
            raise ValueError("the prompt is empty: give at least one token")
        V = self.config.vocab_size
        if not 0 <= idx.min() <= idx.max() < V:
            outside = idx[(idx < 0) | (idx >= V)][0]
            raise ValueError(f"the prompt has token {outside}, outside the vocabulary of {V}")
        T, cache = self.config.block_size, None
        for _ in range(max_new_tokens):
            context = idx[:, -1:]
            if not cache or idx.shape[1] > T:
                cache = [{} for _ in self.blocks]
                context = idx[:, -T:]
            logits = self(context, cache=cache)[0][:, -1].float()  # (B, V)
            new = choose(logits, temperature, top_k, generator)
            idx = torch.cat((idx, new), dim=1)
        return idx

    @classmethod
    def from_checkpoint(cls, checkpoint, device="cpu"):
        """
        The model of a checkpoint, a path or what load_checkpoint gave, in eval mode. Raises what
        load_checkpoint raises.
        """
        if not isinstance(checkpoint, dict):
            checkpoint = load_checkpoint(checkpoint)
        model = cls(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval()

    @classmethod
    def from_gpt2(cls, path="gpt2"):
        """
        OpenAI's GPT-2 with all its biases, in eval mode, from a .safetensors file in Hugging Face's
        layout, a folder with one, or a hub id. Raises what read_gpt2 raises: see gpt2.py.
        """
        flags, weights = read_gpt2(path)
        model = cls(GPTConfig(**flags))
        try:
            model.load_state_dict(weights)
        except RuntimeError as e:  # shapes that don't belong together
            raise ValueError(f"{path} does not hold a GPT-2: {e}") from e
        return model.eval()


# ------------------------------------------------------------------------------------ checkpoints
def save_checkpoint(path, model, /, **rest):
    """
    Write model, its config and `rest` to path, so that an interruption leaves the old file or the
    new one, never half of one; `rest` may have the model's state dict, as `model`. Raises OSError
    with the file and the cause if it can't be written; the old file is then as it was.
    """
    content = {"model": model.state_dict(), "model_config": asdict(model.config), **rest}
    try:
        with open(path + ".tmp", "wb") as file:
            torch.save(content, file)
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch's own error hides the disk's
        raise OSError(f"can't write {path}: {getattr(cause, 'strerror', None) or e}") from e
    finally:
        if os.path.lexists(path + ".tmp"):  # not when all went well
            os.remove(path + ".tmp")


def load_checkpoint(path, *needed):
    """
    The dict that save_checkpoint wrote, on the CPU: "model", "model_config" and whatever train.py
    added, among it the keys `needed`. Raises OSError if it can't be read, ValueError if it is
    truncated, damaged, something else, or lacks a key.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}: train one first with python train.py, "
                                "or name another")
    try:
        with open(path, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        config = checkpoint["model_config"]
        config.setdefault("final_layernorm", config["use_layernorm"])  # once one flag was both
        checkpoint["model"] = dict(checkpoint["model"])  # less its metadata, which steers loading
        with torch.device("meta"):  # names and shapes are compared, and nothing is computed
            GPT(GPTConfig(**config)).load_state_dict(checkpoint["model"], assign=True)
    except PermissionError:
        raise
    except Exception as e:  # torch.load fails in many ways on a broken file
        reason = e if type(e) is ValueError else type(e).__name__
        raise ValueError(f"{path} is not a whole checkpoint of train.py (truncated, damaged or of "
                         f"another program; {reason}): delete it or name another") from e
    for key in needed:
        if key not in checkpoint:
            raise ValueError(f"{path} has no {key!r}: it was not written by this train.py")
    return checkpoint
