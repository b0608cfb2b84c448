"""
A small GPT that learns to write Shakespeare, a character at a time.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py

hardware  one GPU, minutes; config/train_shakespeare_char_cpu.py is for a machine without one
expected  best val loss about 1.47 on tiny Shakespeare (nanoGPT publishes 1.4697)
"""
out_dir = 'out-shakespeare-char'
eval_interval = 250 # often: this model overfits within its 5000 iterations
eval_iters = 200
log_interval = 10
always_save_checkpoint = False # only when the val loss got better, so what stays is the best

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256 # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3 # a small model can go faster than GPT-2
max_iters = 5000
lr_decay_iters = 5000 # max_iters
min_lr = 1e-4 # learning_rate / 10
beta2 = 0.99 # a little more memory, as an iteration has few tokens
warmup_iters = 100
