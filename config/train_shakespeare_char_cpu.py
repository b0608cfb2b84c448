"""
The same idea for a machine without a GPU: a smaller model, a shorter context, fewer iterations.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_cpu.py

hardware  2 CPU cores, minutes
expected  a loss over all of val.bin below 1.80 on tiny Shakespeare (nanoGPT's CPU settings reach 1.88)
"""
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 20 # noisier, faster
log_interval = 10
full_val = True
always_save_checkpoint = False

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0 # too small and too short a run to overfit

learning_rate = 3e-3 # a model this small learns fastest like that
max_iters = 2000
lr_decay_iters = 2000 # max_iters
min_lr = 1e-4 # learning_rate / 10
beta2 = 0.99
warmup_iters = 100

device = 'cpu'
compile = False # compiling takes longer than it saves here
