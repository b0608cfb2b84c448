"""
GPT-2 XL, pretrained, finetuned on Shakespeare for a few minutes.

    python data/shakespeare/prepare.py
    python train.py config/finetune_shakespeare.py

hardware  one GPU of 80 GB; with less memory, a smaller model: --init_from=gpt2
expected  the val loss falls for some evaluations, then rises; the best checkpoint is kept
"""
out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False # only when the val loss got better

wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-gpt2-xl'

dataset = 'shakespeare'
init_from = 'gpt2-xl' # or gpt2, gpt2-medium, gpt2-large, or a local folder in transformers' format

# 1 sequence * 32 * 1024 tokens = 32,768 tokens an iteration; the text has 301,966, about 9 iterations an epoch
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False # constant: too few iterations for a schedule
