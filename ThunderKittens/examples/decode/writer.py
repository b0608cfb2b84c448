"""
Text that grows by a token a row at a time, on a GPU by CUDA graphs: what GPT.stream does.
"""
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from ThunderKittens.examples import decode
from ThunderKittens.examples.decode.sampling import pick, row_seeds

# Every new token is another length, and cuDNN would plan anew for each.
WHILE_GENERATING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def write(model, prompts, max_new_tokens, seed, choice):
    """GPT.stream of a model, with pick()'s settings in the dict `choice`; its tokens may change at the next call."""
    if max_new_tokens < 1:
        return
    device, block_size, longest = prompts[0].device, model.config.block_size, max(map(len, prompts))
    T, new = longest, max_new_tokens
    if decode.can_replay(device): # what is captured serves all prompts of about this length
        T, new = (-(-n // 64) * 64 for n in (longest, max_new_tokens))
    key = str((device, len(prompts), T, new, sorted(choice.items()), model.training,
               torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type),
               torch.get_float32_matmul_precision(), [block.attn.TK_kernel for block in model.transformer.h],
               [p.data_ptr() for p in model.parameters()])) # all that a captured graph depends on
    writer = model.writers.pop(key, None) # nobody else's while this one writes
    if writer is None:
        model.writers.clear() # and with it the memory
        writer = Writer(model, len(prompts), T, new, choice, device)
    writer.begin(prompts, seed)
    try:
        for n in range(max_new_tokens):
            way = 'prompt' if n == 0 else 'newest' if longest + n <= block_size else 'window'
            writer.take[way]()
            yield writer.text[:, T + n]
    except GeneratorExit: # enough has been read
        pass
    if decode.can_replay(device) and not writer.casts:
        model.writers[key] = writer


class Writer:
    """
    Rows of text that grow by a token each at a time, in tensors that keep their places, so that on a GPU each of the
    three ways to the next token becomes a CUDA graph: take['prompt'], then take['newest'] or take['window'].

    T    columns for the prompts, which stand at their right end: all rows' newest tokens share a column
    new  columns after them
    """

    def __init__(self, model, B, T, new, choice, device):
        self.model, self.choice, self.device, self.casts = model, choice, device, False
        self.T, self.block_size = T, model.config.block_size
        self.text = torch.zeros(B, T + new, dtype=torch.long, device=device)
        self.counters = torch.zeros(1 + B, dtype=torch.long, device=device)
        self.newest, self.place = self.counters[:1], self.counters[1:] # the newest token's column; its place in a row
        self.rows, self.seeds = torch.arange(B, device=device), torch.zeros(B, dtype=torch.long, device=device)
        self.caches = model.new_caches(min(self.block_size, T + new), self.place)
        self.step = None
        self.take = {'prompt': self.take_prompt, 'newest': self.take_newest, 'window': self.take_window}
        if decode.can_replay(device):
            self.take['prompt'], self.take['window'] = map(decode.replayed, (self.take_prompt, self.take_window))
            drops = model.training and model.config.dropout > 0 # which the kernels do not
            if not drops and not decode.why_unavailable(device.type):
                self.take['newest'] = decode.replayed(self.take_newest_by_kernels)

    def begin(self, prompts, seed):
        text = pad_sequence(prompts, batch_first=True, padding_side='left')
        self.text[:, self.T - text.size(1):self.T] = text
        self.counters.copy_(torch.tensor([self.T - 1] + [len(prompt) - 1 for prompt in prompts]))
        self.seeds.copy_(row_seeds(seed, len(prompts), self.device))

    def append(self, logits):
        """Draw each row's next token: logits (B, V)."""
        self.counters.add_(1)
        self.text.index_copy_(1, self.newest, pick(logits, self.seeds, self.place, **self.choice)[:, None])

    def take_window(self, T=None, caches=None):
        """The last T tokens of each row, all of a shorter one."""
        T = T or self.block_size
        first = self.newest - self.place + (self.place + 1 - T).clamp(min=0) # (B) a window's first column
        places = torch.arange(T, device=self.device)
        columns = (first[:, None] + places).clamp(max=self.text.size(1) - 1) # (B, T); none sees what follows a row
        with sdpa_kernel(WHILE_GENERATING):
            x = self.model.features(self.text.gather(1, columns), places, caches)[self.rows, self.newest - first]
        self.append(self.model.lm_head(x))

    def take_prompt(self):
        """The prompts, whose keys and values are kept."""
        for cache in self.caches:
            cache.filled = 0
        self.take_window(min(self.T, self.block_size), self.caches)

    def take_newest(self):
        """The newest tokens alone, at their own places, looking back at what is kept."""
        ids, place = self.text.index_select(1, self.newest), self.place[:, None] # (B, 1) each
        with sdpa_kernel(WHILE_GENERATING):
            x = self.model.features(ids, place, self.caches)[:, 0] # (B, C)
        self.append(self.model.lm_head(x))

    def take_newest_by_kernels(self):
        """The same in few kernels."""
        if self.step is None:
            self.step = decode.Step(self.model, [cache.kv for cache in self.caches])
            self.casts = self.caches[0].kv.dtype != self.model.lm_head.weight.dtype
        logits = self.step(self.text, self.newest, self.place)
        choice = {'temperature': 1.0, **self.choice}
        if choice['temperature'] == 0 or choice.get('top_p') is not None:
            return self.append(logits)
        decode.append(logits[:, :choice.get('n_tokens')], self.seeds, self.text, self.newest, self.place,
                      choice['temperature'], choice.get('top_k'))
