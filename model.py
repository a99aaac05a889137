"""
The GPT of "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489), whole, in one file.

Notable features:
- GPT-2: decoder-only, pre-LN, learned positions, tied input and output embeddings, no dropout
- a flag for every nonlinearity (LayerNorm, GELU, ReLU; softmax always stays) and for every replacement of the
  paper: fused FFN, learnable FFN scales (eq. 8), learnable softmax temperatures (eq. 9), weight / spectral norm
- biases where the paper's code base has them: on Q, K and LayerNorm; none on V, the output projection and the FFN
- attention entropies of every layer, head and query position, in nats, when asked for
- counts its own nonlinear operations and FLOPs, as the paper's tables do

Written (B, T, d) = (batch, context, n_embd), H = n_head, L = n_layer, V = vocab_size, d_k = d / H.
"""
import json
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from entropy import attention_with_entropy, causal_block_mask

NORM_PLACES = ("none", "qk", "ffn", "qk+ffn", "qkv+ffn", "qkvo+ffn")  # the columns of the paper's Table 4

ACTIVATIONS = {  # GPTConfig.activation: its letter in the paper's names, and the function
    "gelu": ("G", nn.GELU()),
    "gelu_tanh": ("G", nn.GELU("tanh")),
    "relu": ("R", nn.ReLU()),
    "none": ("", nn.Identity()),
}


@dataclass
class GPTConfig:
    block_size: int = 128  # T, the context length
    vocab_size: int = 4096  # V
    n_layer: int = 6  # L
    n_head: int = 6  # H
    n_embd: int = 192  # d
    use_layernorm: bool = True  # LN: before attention and before the FFN of every block
    final_layernorm: bool = True  # ln_f, before the vocabulary: the paper's LayerNorm-free models most likely keep it
    use_gelu: bool = True  # G: GELU in the FFN
    use_relu: bool = False  # R: ReLU in the FFN
    fuse_ffn: bool = False  # Fu: one d x d matrix for W_in W_out, which nothing nonlinear separates
    learnable_ffn_scale: bool = False  # Sc: alpha and beta per layer, eq. 8
    learnable_temperature: bool = False  # SM(t): a temperature per head and query position, eq. 9
    temperature_per_head: bool = False  # one per head alone, SM(th): not the paper's; it folds into W_Q, so it is free in private inference
    temperature_init: float = 1e-2  # where t starts (the paper: 1e-2 on CodeParrot, 1e-1 on Languini)
    weight_norm: str = "none"  # the linears that carry weight norm, one of NORM_PLACES
    spectral_norm: str = "none"  # the linears that carry spectral norm, one of NORM_PLACES
    bias: bool = False  # biases also on V, output projection and FFN, as OpenAI's GPT-2 has them
    gelu_tanh: bool = False  # GELU by its tanh approximation, OpenAI's GPT-2's (a third slower on a CPU)

    def __post_init__(self):
        """Refuse what cannot be built. Raises ValueError with a sentence."""
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, and is {getattr(self, key)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} cannot be split among n_head={self.n_head} heads")
        if self.use_gelu and self.use_relu:
            raise ValueError("use_gelu and use_relu are both on: the FFN has one activation, switch one off")
        if self.fuse_ffn and self.activation != "none":
            raise ValueError("fuse_ffn needs an FFN without activation: set use_gelu=False and use_relu=False")
        if self.temperature_init <= 0:
            raise ValueError(f"temperature_init must be positive, and is {self.temperature_init}")
        for key in ("weight_norm", "spectral_norm"):
            if getattr(self, key) not in NORM_PLACES:
                raise ValueError(f"{key} must be one of {', '.join(NORM_PLACES)}, and is {getattr(self, key)!r}")
        if "none" not in (self.weight_norm, self.spectral_norm):
            raise ValueError("weight_norm and spectral_norm are both on: choose one")

    @property
    def activation(self):
        """The FFN's activation, a key of ACTIVATIONS; "none" for a linear FFN."""
        if self.use_gelu:
            return "gelu_tanh" if self.gelu_tanh else "gelu"
        return "relu" if self.use_relu else "none"

    @property
    def name(self):
        """The paper's name of this architecture (Table 1), such as SM+LN+G or SM(t)+ScFuFFN."""
        parts = ["SM(th)" if self.learnable_temperature and self.temperature_per_head else "SM(t)" if self.learnable_temperature else "SM"]
        parts += ["LN"] * self.use_layernorm + [ACTIVATIONS[self.activation][0]] * (self.activation != "none")
        if self.fuse_ffn or self.learnable_ffn_scale:
            parts.append("Sc" * self.learnable_ffn_scale + "Fu" * self.fuse_ffn + "FFN")
        for norm, where in (("WNorm", self.weight_norm), ("SNorm", self.spectral_norm)):
            parts += [f"{norm}({where.upper()})"] * (where != "none")
        return "+".join(parts) + ("" if self.final_layernorm else ", no ln_f")


def cpu_bf16_unit():
    """What makes bfloat16 matrix products faster than float32 on this processor: "AMX", "AVX512-BF16", or "" if nothing does."""
    return "AMX" if torch.cpu._is_amx_tile_supported() else "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() else ""


def linear(c, d_in, d_out, part, bias):
    """A Linear initialised N(0, 0.02), under c's weight or spectral norm if that covers `part` ("qk", "v", "o", "ffn")."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    for place, norm in ((c.weight_norm, parametrizations.weight_norm), (c.spectral_norm, parametrizations.spectral_norm)):
        covered = place.split("+")  # e.g. "qkv+ffn" -> "qkv", "ffn"
        if part in covered or any(part in p for p in covered if p.startswith("qk")):
            norm(layer)
    return layer


class Attention(nn.Module):
    """Causal multi-head attention, eq. 3 and 6, with the learnable temperature of eq. 9."""

    def __init__(self, c):
        super().__init__()
        d, self.n_head = c.n_embd, c.n_head
        self.qk = linear(c, d, 2 * d, "qk", bias=True)  # W_Q and W_K side by side
        self.v = linear(c, d, d, "v", bias=c.bias)
        self.o = linear(c, d, d, "o", bias=c.bias)
        if c.learnable_temperature:
            # log t is what is learned: t stays positive whatever the optimizer does
            positions = 1 if c.temperature_per_head else c.block_size
            self.log_temperature = nn.Parameter(torch.full((c.n_head, positions), math.log(c.temperature_init)))

    @property
    def temperature(self):
        """t, (H, block_size), or (H, 1) with temperature_per_head; always positive."""
        return self.log_temperature.exp()

    def forward(self, x, return_entropy=False, block_mask=None):
        """x (B, T, d) -> y (B, T, d), and the entropy (B, H, T) in nats if asked for, else None. block_mask: see GPT.forward."""
        B, T, d = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (*self.qk(x).split(d, dim=-1), self.v(x)))
        if hasattr(self, "log_temperature"):
            q = q / self.temperature[:, :T, None]  # row i of the logits divided by t_i is q_i divided by t_i
        with torch.autocast("cpu", enabled=False):  # its softmax wants fp32, and scaled_dot_product_attention is slower in bf16 there
            if return_entropy:
                y, entropy = attention_with_entropy(q, k, v, block_mask)
            else:
                if v.dtype == torch.bfloat16 and v.device.type == "cpu":
                    q, k, v = q.float(), k.float(), v.float()
                y, entropy = F.scaled_dot_product_attention(q, k, v, is_causal=True), None
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
    """X_SA = X + MHA(LN(X)); X_out = beta X_SA + (1/alpha) FFN(LN(X_SA)), eq. 1 and 8 (alpha = beta = 1 if not learned)."""

    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = norm(c.use_layernorm, c), norm(c.use_layernorm, c)
        self.attn, self.ffn = Attention(c), FFN(c)
        if c.learnable_ffn_scale:
            self.alpha, self.beta = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x, return_entropy=False, block_mask=None):
        y, entropy = self.attn(self.ln_1(x), return_entropy, block_mask)
        x = x + y
        y = self.ffn(self.ln_2(x))
        return (self.beta * x + y / self.alpha if hasattr(self, "alpha") else x + y), entropy


def norm(used, c):
    return nn.LayerNorm(c.n_embd) if used else nn.Identity()


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.wte = nn.Embedding(c.vocab_size, c.n_embd)  # also the output matrix
        self.wpe = nn.Embedding(c.block_size, c.n_embd)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = norm(c.final_layernorm, c)

    def forward(self, idx, targets=None, return_entropy=False):
        """
        idx: (B, T) token ids below V, T <= block_size; targets: (B, T), -1 where there is nothing to predict.

        Returns logits (B, T, V); the mean cross-entropy in nats, None without targets; and, if return_entropy,
        the attention entropies (L, B, H, T) in nats, else None. Raises ValueError if T exceeds block_size.
        """
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[:T]
        entropies, block_mask = [], None
        if return_entropy and idx.is_cuda and torch.compiler.is_compiling():  # the fused call pays where it is compiled
            block_mask = causal_block_mask(T, idx.device)
        for block in self.blocks:
            x, entropy = block(x, return_entropy, block_mask)
            entropies.append(entropy)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss, torch.stack(entropies) if return_entropy else None

    def param_groups(self, weight_decay):
        """AdamW groups: decay on embeddings and matrices; none on biases, LayerNorms, gains, temperatures, alpha, beta."""
        # .original1 and .original hold the matrix under weight norm and spectral norm; weight norm's gain is .original0
        def decays(name):
            return name.endswith((".weight", ".original", ".original1")) and ".ln_" not in f".{name}"

        named = dict(self.named_parameters())
        return [{"params": [p for n, p in named.items() if decays(n)], "weight_decay": weight_decay},
                {"params": [p for n, p in named.items() if not decays(n)], "weight_decay": 0.0}]

    def nonlinear_ops(self):
        """
        Nonlinear operations of one forward pass over T = block_size tokens: {kind: (how many, shape of each)}, the
        "#Nonlinear Ops" column of Tables 2, 3, 6 and 7. Kinds SM, LN, G, R. As there, the final LayerNorm isn't counted.
        """
        c = self.config
        ops = {"SM": (c.n_layer * c.n_head, (c.block_size, c.block_size))}
        if c.use_layernorm:
            ops["LN"] = (2 * c.n_layer, (c.block_size, c.n_embd))
        if c.activation != "none":
            ops[ACTIVATIONS[c.activation][0]] = (c.n_layer, (c.block_size, 4 * c.n_embd))
        return ops

    def flops(self):
        """
        FLOPs of one forward pass over T = block_size tokens as the paper's tables count them: {"ffn": , "attn": }.
        Q K^T counts whole, A V only its causal half; embedding and vocabulary projection are left out.
        """
        c = self.config
        L, T, d = c.n_layer, c.block_size, c.n_embd
        return {"ffn": L * 2 * T * d * d * (1 if c.fuse_ffn else 8),
                "attn": L * 2 * T * 4 * d * d + L * 3 * T * T * d}

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
        """
        Sample max_new_tokens after idx (B, T), from the top_k likeliest tokens each (0: all), at a softmax
        `temperature` over the vocabulary (0: always the likeliest). Returns (B, T + max_new_tokens).
        Raises ValueError if idx is empty or holds a token outside the vocabulary.
        """
        if idx.numel() == 0:
            raise ValueError("the prompt is empty: give at least one token")
        if not 0 <= idx.min() <= idx.max() < self.config.vocab_size:
            raise ValueError(f"the prompt has token {int(idx.max())}, outside the vocabulary of {self.config.vocab_size}")
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[0][:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k:
                    logits[logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]] = -math.inf
                new = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
        return idx

    @classmethod
    def from_checkpoint(cls, checkpoint, device="cpu"):
        """The model of a checkpoint, a path or what load_checkpoint gave, in eval mode. Raises what load_checkpoint raises."""
        checkpoint = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
        model = cls(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval()

    @classmethod
    def from_gpt2(cls, path="gpt2"):
        """
        OpenAI's GPT-2 weights as a GPT with all its biases, in eval mode.

        path: a .safetensors file in Hugging Face's GPT-2 layout, a folder with a model.safetensors, or a hub id
        ("gpt2", "gpt2-medium", ...). n_head is read from the config.json beside the weights, else taken as d / 64
        (true of every released GPT-2). Raises FileNotFoundError if there is no such file and the hub cannot be
        reached, ValueError if the file is not a GPT-2's.
        """
        from safetensors import safe_open  # only this method needs it

        if os.path.isdir(path):
            path = os.path.join(path, "model.safetensors")
        elif not path.endswith(".safetensors"):
            path = hub_gpt2(path)
        try:
            with safe_open(path, "pt") as f:
                theirs = {name.removeprefix("transformer."): f.get_tensor(name) for name in f.keys()}
            V, d = theirs["wte.weight"].shape
            settings = os.path.join(os.path.dirname(path), "config.json")
            n_head = json.load(open(settings))["n_head"] if os.path.exists(settings) else d // 64
            n_layer = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("h."))
            model = cls(GPTConfig(block_size=len(theirs["wpe.weight"]), vocab_size=V, n_layer=n_layer, n_head=n_head,
                                  n_embd=d, bias=True, gelu_tanh=True))
            model.load_state_dict(gpt2_state_dict(theirs, n_layer, d))
        except FileNotFoundError:
            raise
        except Exception as e:  # a missing key, a wrong shape, a damaged file: all mean the same to the user
            raise ValueError(f"{path} does not hold a GPT-2 in Hugging Face's layout ({type(e).__name__}: {e})") from e
        return model.eval()


def hub_gpt2(hub_id):
    """Local path of a hub model's model.safetensors, with its config.json beside it. FileNotFoundError if out of reach."""
    from huggingface_hub import hf_hub_download
    try:
        hf_hub_download(hub_id, "config.json")
        return hf_hub_download(hub_id, "model.safetensors")
    except Exception as e:
        raise FileNotFoundError(f"no file or folder {hub_id!r}, and the Hugging Face hub did not give it ({type(e).__name__}): "
                                f"download model.safetensors and config.json of {hub_id} yourself and pass their folder") from e


def gpt2_state_dict(theirs, n_layer, d):
    """Hugging Face's GPT-2 tensors under our names. Their matrices are (in, out), ours (out, in); theirs hold q, k, v in one."""
    ours = {"wte.weight": theirs["wte.weight"], "wpe.weight": theirs["wpe.weight"],
            "ln_f.weight": theirs["ln_f.weight"], "ln_f.bias": theirs["ln_f.bias"]}
    for i in range(n_layer):
        for kind in ("weight", "bias"):
            t = {name: theirs[f"h.{i}.{name}.{kind}"] for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")}
            t = {name: tensor.t() for name, tensor in t.items()}  # t() leaves vectors as they are
            renamed = {"ln_1": t["ln_1"], "ln_2": t["ln_2"], "attn.qk": t["attn.c_attn"][:2 * d], "attn.v": t["attn.c_attn"][2 * d:],
                       "attn.o": t["attn.c_proj"], "ffn.w_in": t["mlp.c_fc"], "ffn.w_out": t["mlp.c_proj"]}
            ours |= {f"blocks.{i}.{name}.{kind}": tensor for name, tensor in renamed.items()}
    return ours


def save_checkpoint(path, model, **rest):
    """
    Write model, its config and `rest` to path, so that an interruption leaves the old file or the new one, never half
    of one. Raises OSError if it can't be written; the old file is then as it was.
    """
    try:
        torch.save({"model": model.state_dict(), "model_config": asdict(model.config), **rest}, path + ".tmp")
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise OSError(f"can't write {path}: {e}") from e


def load_checkpoint(path):
    """
    The dict that save_checkpoint wrote, on the CPU: "model", "model_config" and whatever train.py added.
    Raises OSError if it can't be read, ValueError if it is truncated, damaged or something else.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path}: train one first with python train.py, or name another")
    with open(path, "rb"):
        pass  # no permission is an OSError of its own; torch raises one on a truncated file, too
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = checkpoint["model_config"]
        config.setdefault("final_layernorm", config["use_layernorm"])  # before this flag, one flag stood for both
        GPT(GPTConfig(**checkpoint["model_config"])).load_state_dict(checkpoint["model"])
    except Exception as e:  # torch.load fails in many ways on a broken file
        raise ValueError(f"{path} is not a whole checkpoint of train.py (truncated, damaged or of another program; "
                         f"{type(e).__name__}): delete it or name another") from e
    return checkpoint
