"""
HellaSwag: which of four endings does the model find the likeliest?

    python data/hellaswag/evaluate.py --init_from=gpt2
    python data/hellaswag/evaluate.py --out_dir=out --data_file=hellaswag_val.jsonl

acc_norm takes the ending with the lowest mean loss a token, as llm.c's eval does; acc the one with the lowest sum.
"""
import json
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2])) # the repository, from any folder
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import configure
from data.run import load_model
from data.tokens import tokenizer

# -----------------------------------------------------------------------------
init_from = 'resume' # resume (out_dir's checkpoint), gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder
out_dir = 'out' # where the checkpoint is
data_file = '' # a .jsonl with ctx, endings and label; empty: the hub's Rowan/hellaswag
split = 'validation' # of the hub's
limit = 0 # the first so many questions only; 0 asks all
batch_size = 32 # questions at once, four texts each
device = 'auto' # cpu, cuda, cuda:1, mps, ...
dtype = 'auto' # float32, bfloat16 or float16
TK_kernel = 'auto' # the ThunderKittens attention: True, False; auto uses it where it can run
# -----------------------------------------------------------------------------
config = configure(globals(), auto={'TK_kernel': bool})
if batch_size < 1 or limit < 0:
    sys.exit(f"--batch_size must be at least 1 and --limit at least 0, not {batch_size} and {limit}")


def read_questions():
    """Dicts with ctx, endings (four) and label, from the file or from the hub."""
    if not data_file:
        from datasets import load_dataset
        try:
            return list(load_dataset('Rowan/hellaswag', split=split))
        except (OSError, ValueError) as e:
            sys.exit(f"the hub's Rowan/hellaswag cannot be had ({str(e).splitlines()[0]}); --data_file takes a .jsonl")
    try:
        lines = Path(data_file).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as e:
        sys.exit(f"--data_file={data_file}: {getattr(e, 'strerror', None) or 'not UTF-8 text'}")
    return [_question(line, number) for number, line in enumerate(lines, 1) if line.strip()]


def _question(line, number):
    try:
        question = json.loads(line)
        if isinstance(question['ctx'], str) and len(question['endings']) == 4 and int(question['label']) in range(4):
            return question
    except (ValueError, KeyError, TypeError):
        pass
    sys.exit(f"--data_file={data_file}, line {number}: must be JSON with ctx, four endings and a label of 0 to 3")


questions = read_questions()
questions = questions[:limit] if limit else questions
if not questions:
    sys.exit(f"--data_file={data_file}: no question there")
model, meta = load_model(config)
device, dtype = config['device'], config['dtype']
device_type = torch.device(device).type
model.to(device)
encode, _, _ = tokenizer(meta)
autocast = nullcontext() if dtype == 'float32' else torch.autocast(device_type, dtype=getattr(torch, dtype))


def ending_losses(texts):
    """
    texts    a list of (context ids, ending ids)
    returns  sum and mean over each ending's tokens of their loss in nats, (len(texts),) each
    """
    T = min(model.config.block_size, max(len(c) + len(e) for c, e in texts) - 1)
    idx = torch.zeros(len(texts), T, dtype=torch.long)
    targets = torch.full((len(texts), T), -1)
    for row, (context, ending) in enumerate(texts):
        ids = (context + ending)[-T - 1:] # a text longer than the model's context loses its beginning
        idx[row, :len(ids) - 1] = torch.tensor(ids[:-1]) # what follows on the right is seen by nobody
        known = min(len(ending), len(ids) - 1) # the first token of all has nothing before it
        targets[row, len(ids) - 1 - known:len(ids) - 1] = torch.tensor(ids[len(ids) - known:])
    targets = targets.to(device)
    with torch.no_grad(), autocast:
        logits, _ = model(idx.to(device), targets) # (B, T, V)
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-1, reduction='none') # (B, T)
    return losses.sum(1), losses.sum(1) / (targets >= 0).sum(1)


right = {'acc': 0, 'acc_norm': 0}
bar = tqdm(range(0, len(questions), batch_size), unit='batch', disable=None) # where it is no terminal
for first in bar:
    batch = questions[first:first + batch_size]
    try:
        texts = [(encode(q['ctx']), encode(' ' + ending)) for q in batch for ending in q['endings']]
    except ValueError as e:
        sys.exit(f"question {first + 1} and on: {e}")
    largest = max(id for text in texts for ids in text for id in ids)
    if largest >= model.config.vocab_size:
        sys.exit(f"question {first + 1} and on: token {largest} is not below vocab_size={model.config.vocab_size}")
    labels = torch.tensor([int(q['label']) for q in batch])
    for name, losses in zip(right, ending_losses(texts)):
        right[name] += int((losses.view(-1, 4).argmin(1).cpu() == labels).sum())
    bar.set_postfix_str(f"acc_norm {right['acc_norm'] / (first + len(batch)):.4f}", refresh=False)
result = {name: round(count / len(questions), 4) for name, count in right.items()}
print(f"{len(questions)} questions: acc_norm {result['acc_norm']:.4f}, acc {result['acc']:.4f}; chance is 0.25")
print(json.dumps({'questions': len(questions), **result, 'model': out_dir if init_from == 'resume' else init_from,
                  'dtype': dtype}))
