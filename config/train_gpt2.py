"""
GPT-2 (124M) from scratch on OpenWebText.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

hardware  8 GPUs of 40 GB or more; nanoGPT took about 4 days on 8 A100
expected  val loss about 2.85 (nanoGPT's figure)
"""
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences * 1024 tokens * 5 steps * 8 GPUs = 491,520 tokens an iteration, as in GPT-2 and GPT-3
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300 billion tokens in all
max_iters = 600000
lr_decay_iters = 600000 # max_iters

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
