"""
Builds the kernels of this folder into one Python module, as attn_causal/h100_fwd_setup.py builds its own:

    cd ThunderKittens/examples/gemm_gelu && python h100_gemm_setup.py build
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE = 'h100_gemm_gelu'

if __name__ == '__main__':
    sys.path.insert(0, str(HERE.parent / 'attn_causal'))
    import h100_fwd_setup
    h100_fwd_setup.main(HERE, MODULE)
