"""
GPT-2 in one file: the layers, the model, its optimiser, its FLOPs and how it speaks.

Parameter names, initialisation and mathematics are nanoGPT's, so checkpoints go both ways.
Letters: B batch, T time, C channels, nh heads, hs head size, V vocabulary.
The ThunderKittens kernel enters at one line of CausalSelfAttention; everything about it lives in
ThunderKittens/examples/attn_causal, and how a token is drawn and text grows in ThunderKittens/examples/decode.
"""
import inspect
import logging
import math
import re
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from ThunderKittens.examples.attn_causal import causal_attention_qkv
from ThunderKittens.examples.decode.sampling import pick, row_seeds
from ThunderKittens.examples.decode.writer import WHILE_GENERATING, write


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304 # GPT-2's 50257, padded up to a multiple of 64: faster matmuls
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True # True: biases in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    # the seven above are nanoGPT's and travel in a checkpoint's model_args; ours stand below
    gelu: str = 'none' # 'none' is the exact erf form, as nanoGPT trains; 'tanh' is pretrained GPT-2's
    TK_kernel: bool = False # attention by the ThunderKittens kernel instead of torch's SDPA

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd} and n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.gelu not in ('none', 'tanh'):
            raise ValueError(f"gelu must be 'none' or 'tanh', got {self.gelu!r}")

    def model_args(self):
        """The arguments that nanoGPT's own GPTConfig takes, and nothing else."""
        return {k: v for k, v in asdict(self).items() if k not in ('gelu', 'TK_kernel')}


class LayerNorm(nn.Module):
    """LayerNorm whose bias is optional."""

    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.TK_kernel = config.TK_kernel

    def forward(self, x, cache=None):
        qkv = self.c_attn(x) # (B, T, 3C): every head's query, then every head's key, then every head's value
        if cache is not None and cache.filled:
            y = cache.attend(qkv) # (B, 1, C): a new token each, looking back at what is kept
        else:
            dropout = self.dropout if self.training else 0.0
            attention = causal_attention_qkv if self.TK_kernel else sdpa_attention_qkv
            y = attention(qkv, self.n_head, dropout) # (B, T, C)
            if cache is not None:
                cache.fill(qkv, self.n_head)
        return self.resid_dropout(self.c_proj(y))


def sdpa_attention_qkv(qkv, n_head, dropout=0.0):
    """
    Causal self-attention by torch's scaled_dot_product_attention.

    qkv      (B, T, 3C), any dtype and device: queries, keys, values, each n_head heads of C / n_head
    returns  (B, T, C): the heads' outputs side by side
    """
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4) # each (B, nh, T, hs)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True) # (B, nh, T, hs)
    return y.transpose(1, 2).reshape(B, T, C3 // 3) # (B, T, C)


class LayerCache:
    """
    The keys and values of one layer, kept so that a new token costs no more than itself.

    room     (int) tokens a row may come to hold
    lengths  (B) int64 on the device: how many tokens each row holds; the rows share it over all layers
    """

    def __init__(self, room, lengths):
        self.room, self.lengths = room, lengths
        self.kv, self.filled = None, 0 # filled: tokens of the longest row

    def fill(self, qkv, n_head):
        """Keep a prompt's keys and values: qkv (B, T, 3C), rows shorter than T padded on the right."""
        B, T, C3 = qkv.shape
        if self.kv is None:
            self.kv = qkv.new_zeros(2, B, n_head, self.room, C3 // 3 // n_head) # (2, B, nh, room, hs)
        self.kv[:, :, :, :T] = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)[1:]
        self.filled = T

    def attend(self, qkv):
        """Each row's new token, at place lengths[row], over all that the row holds: qkv (B, 1, 3C) -> (B, 1, C)."""
        _, B, n_head, _, _ = self.kv.shape
        q, k, v = qkv.view(B, 3, n_head, -1).unbind(1) # (B, nh, hs) each
        rows = torch.arange(B, device=q.device)
        self.kv[0, rows, :, self.lengths] = k # over the padding of a shorter row
        self.kv[1, rows, :, self.lengths] = v
        self.filled = min(self.filled + 1, self.room)
        k, v = self.kv[..., :self.filled, :] # (B, nh, filled, hs) each
        seen = torch.arange(self.filled, device=q.device) <= self.lengths[:, None] # (B, filled)
        y = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen[:, None, None]) # (B, nh, 1, hs)
        return y.reshape(B, 1, -1)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.writers = {} # what generation keeps for the next call of the same shape
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight # weight tying, https://paperswithcode.com/method/weight-tying
        if self.lm_head.weight.is_meta:
            return # built only to be filled with given weights
        self.apply(self._init_weights)
        for name, p in self.named_parameters(): # GPT-2: projections into the residual stream start smaller
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if getattr(module, 'bias', None) is not None:
                nn.init.zeros_(module.bias)

    def __getstate__(self):
        """What a copy or a pickle of the model takes along: no CUDA graphs, which belong to these very tensors."""
        return {**self.__dict__, 'writers': {}}

    def get_num_params(self, non_embedding=True):
        """Number of parameters, by default without the position embeddings (the token ones are the head's)."""
        n_params = sum(p.numel() for p in self.parameters())
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def forward(self, idx, targets=None):
        """
        idx      (B, T) int64 token ids, T at most block_size
        targets  (B, T) int64 or None; -1 marks places that do not count
        returns  (logits, loss): with targets (B, T, V) and their mean cross-entropy in nats, else (B, 1, V) of the
                 last place and None
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(f"at most block_size={self.config.block_size} tokens at once, got {T}")
        x = self.features(idx, torch.arange(T, device=idx.device)) # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x) # (B, T, V)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)

    def features(self, idx, pos, caches=None):
        """What lm_head reads: idx (B, T) at places pos, (T) or (B, T), -> (B, T, C); caches, one a layer, are kept."""
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos)) # (B, T, C)
        for block, cache in zip(self.transformer.h, caches or [None] * self.config.n_layer):
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def crop_block_size(self, block_size):
        """Forget the positions from `block_size` on; ValueError if there are fewer."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size must be 1 to {self.config.block_size}, the model's own, got {block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())

    @classmethod
    def from_state_dict(cls, config, state_dict):
        """
        A model that holds the given tensors themselves: nothing is initialised first or copied.

        state_dict  nanoGPT's names, perhaps prefixed by torch.compile's _orig_mod.
        raises      ValueError naming a tensor that is missing, unknown or of another shape
        """
        weights = {k.removeprefix('_orig_mod.'): v for k, v in state_dict.items()
                   if not k.endswith(('.attn.bias', '.attn.masked_bias'))} # causal masks of old versions
        weights.setdefault('lm_head.weight', weights.get('transformer.wte.weight'))
        with torch.device('meta'):
            model = cls(config)
        wanted = model.state_dict()
        for name in sorted(wanted.keys() | weights.keys()):
            if weights.get(name) is None:
                raise ValueError(f"the weights lack {name}")
            if name not in wanted:
                raise ValueError(f"the model has no {name}")
            if weights[name].shape != wanted[name].shape:
                raise ValueError(f"{name} must be {tuple(wanted[name].shape)}, got {tuple(weights[name].shape)}")
        model.load_state_dict(weights, assign=True)
        model.transformer.wte.weight = model.lm_head.weight # assigning untied them
        return model.requires_grad_(True)

    @classmethod
    def from_checkpoint(cls, checkpoint, **overrides):
        """
        The model in a ckpt.pt of ours or nanoGPT's, given as the dict that torch.load returned.

        overrides  fields of GPTConfig that do not change a weight's shape: dropout, TK_kernel
        raises     ValueError where the dict is not such a checkpoint
        """
        for key in ('model', 'model_args'):
            if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), dict):
                raise ValueError(f"not a nanoGPT checkpoint: it has no {key!r}")
        known = inspect.signature(GPTConfig).parameters
        for name in checkpoint['model_args']:
            if name not in known:
                raise ValueError(f"model_args holds an unknown {name!r}")
        args = {**checkpoint['model_args'], 'gelu': checkpoint.get('gelu', 'none'), **overrides}
        return cls.from_state_dict(GPTConfig(**args), checkpoint['model'])

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """
        GPT-2's weights in transformers' format.

        model_type     'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl' from the hub, or a local folder
        override_args  fields of GPTConfig that do not change a weight's shape: dropout, TK_kernel
        raises         OSError with one line where there is no such model, ValueError where it is not a GPT-2
        """
        from transformers import GPT2LMHeadModel
        from transformers import logging as transformers_logging
        transformers_logging.set_verbosity_error() # its own notices are for users of transformers
        transformers_logging.disable_progress_bar()
        logging.getLogger('huggingface_hub').setLevel(logging.ERROR) # the line below says what came of its tries
        try:
            hf = GPT2LMHeadModel.from_pretrained(model_type, dtype=torch.float32)
        except OSError as e:
            raise OSError(f"cannot load {model_type!r}: neither a local folder in transformers' format nor a model "
                          "that the hub or its cache gave; save it where there is a network and give the folder "
                          f"({str(e).splitlines()[0]})") from None
        hf_config, weights = hf.config, hf.state_dict()
        if getattr(hf_config, 'activation_function', None) not in ('gelu_new', 'gelu_pytorch_tanh', 'gelu'):
            raise ValueError(f"activation gelu_new or gelu, got {getattr(hf_config, 'activation_function', None)}")
        del hf
        bias = getattr(hf_config, 'nanogpt_bias', True) # data/export.py fills absent biases with zeros, and says so
        for name in list(weights):
            if name.endswith(TRANSPOSED):
                weights[name] = weights[name].t().contiguous()
            elif name.endswith('.bias') and not bias:
                del weights[name]
        config = GPTConfig(block_size=hf_config.n_positions, vocab_size=hf_config.vocab_size, n_layer=hf_config.n_layer,
                           n_head=hf_config.n_head, n_embd=hf_config.n_embd, bias=bias,
                           gelu='none' if hf_config.activation_function == 'gelu' else 'tanh', **(override_args or {}))
        return cls.from_state_dict(config, weights)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, kind=torch.optim.AdamW):
        """AdamW that decays matrices and embeddings, and neither biases nor LayerNorms; fused on CUDA."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
        return kind(groups, lr=learning_rate, betas=betas, fused=device_type == 'cuda')

    def cast_linears(self, dtype):
        """Linear weights and biases in `dtype`, as autocast casts them at each use, for generation. The head's are no
        longer the embedding's: that stays float32, as LayerNorms do."""
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach().clone())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self

    def flops_per_token(self, causal=False):
        """
        Training FLOPs of one token, forward and backward: 6N + 12 L H Q T, PaLM's appendix B, arXiv:2204.02311.
        `causal` counts only the half of the attention scores that a causal model uses.
        """
        c = self.config
        attention = 12 * c.n_layer * c.n_embd * c.block_size
        return 6 * self.get_num_params() + (attention // 2 if causal else attention)

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """
        Share of the device's peak bf16 FLOPs that a step of `fwdbwd_per_iter` sequences in `dt` seconds reaches.
        None on a device whose peak is not in PEAK_FLOPS: then tokens/s is all that can be said.
        """
        device = self.lm_head.weight.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == 'cuda' else None
        flops = self.flops_per_token() * self.config.block_size * fwdbwd_per_iter
        return flops / dt / peak if peak else None

    @torch.no_grad()
    def generate_plain(self, idx, max_new_tokens, **choice):
        """nanoGPT's own loop, the definition of generate: the whole of the last block_size tokens for each new one."""
        seeds = row_seeds(choice.pop('seed', None), len(idx), idx.device)
        for _ in range(max_new_tokens):
            with sdpa_kernel(WHILE_GENERATING):
                logits, _ = self(idx[:, -self.config.block_size:])
            next_id = pick(logits[:, -1], seeds, idx.size(1), **choice) # (B)
            idx = torch.cat((idx, next_id[:, None]), dim=1)
        return idx

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, seed=None, **choice):
        """
        Continue idx by max_new_tokens tokens, each drawn from the model's distribution given the last block_size.

        idx       (B, T) int64, T at least 1
        seed      an int: the same text again
        choice    temperature, top_k, top_p, n_tokens as in pick()
        returns   (B, T + max_new_tokens), token for token what generate_plain returns
        """
        new = write(self, list(idx), max_new_tokens, seed, choice)
        return torch.cat([idx, *(ids[:, None] for ids in new)], dim=1)

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, seed=None, **choice):
        """
        generate() for prompts of any lengths, a list of (T) int64: yields each row's next token, (B) int64.

        Keys and values are kept until the longest row holds block_size tokens. From there on the window moves, every
        place in it is another one, and as in nanoGPT each new token takes the whole window. On a GPU a token costs the
        host the replay of a CUDA graph, and nothing here waits for the device: reading a token is what waits.
        """
        for ids in write(self, prompts, max_new_tokens, seed, choice):
            yield ids.clone()

    def new_caches(self, room, lengths):
        """A LayerCache for each layer."""
        return [LayerCache(room, lengths) for _ in self.transformer.h]


# OpenAI's Conv1D, and so transformers' GPT-2, keeps these as (in, out), a Linear as (out, in).
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')

# Peak dense bf16 FLOP/s by device name, from the vendor's datasheets; the first name that fits wins.
PEAK_FLOPS = {
    'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H200 NVL': 835e12, 'H200': 989e12, 'GH200': 989e12,
    'A100': 312e12, 'B200': 2250e12, 'L40S': 362e12,
}


def peak_flops(device_name):
    """Peak dense bf16 FLOP/s of a device by its name, None where it is not in the table."""
    if ' MIG ' in device_name: # a slice of a card
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf'\b{name}\b', device_name)), None)
