"""The kernels' modules: built without a GPU, found again, and refused with the reason and the command that helps."""
import contextlib
import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import nvcc_or_skip
from ThunderKittens.examples import attn_causal, gemm_gelu
from ThunderKittens.examples.attn_causal import h100_fwd_setup as setup

SCRIPTS = {attn_causal: 'h100_fwd_setup.py', gemm_gelu: 'h100_gemm_setup.py'}
each_package = pytest.mark.parametrize('package', SCRIPTS, ids=lambda package: package.HERE.name)


@each_package
def test_the_kernels_build_without_a_gpu_and_the_module_imports(package, tmp_path):
    nvcc_or_skip() # spills, serialised wgmma and a missing HGMMA fail the build itself
    script = package.HERE / SCRIPTS[package]
    built = subprocess.run([sys.executable, str(script), 'build', '--build-base', str(tmp_path)],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    module, = tmp_path.glob(f'lib.*/{package.MODULE}.*.so')
    loaded = subprocess.run([sys.executable, '-c', f'import {package.MODULE} as m; print(m.sources)'],
                            env=os.environ | {'PYTHONPATH': str(module.parent), 'CUDA_VISIBLE_DEVICES': ''},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert loaded.stdout.strip() == setup.sources_hash(package.HERE), loaded.stdout
    if shutil.which('ldd'):
        libraries = subprocess.run(['ldd', str(module)], stdout=subprocess.PIPE, text=True).stdout
        assert 'cuda' not in libraries and 'torch' not in libraries, libraries


@pytest.mark.parametrize('said, complaint', [
    ("ptxas info : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized", 'serialised'),
    ("ptxas info : (C7509) Potential Performance Loss: wgmma.mma_async instructions are serialized", 'serialised'),
    ("ptxas info : (C7517) Potential Performance Loss: warpgroup.wait is injected in around line 9", 'serialised'),
    ("ptxas info : (C7507) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum", 'serialised'),
    ("    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads", 'spill')])
def test_a_spill_or_a_serialised_wgmma_fails_the_build(said, complaint):
    setup.check_ptxas('x.cu', "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    with pytest.raises(SystemExit, match=complaint):
        setup.check_ptxas('x.cu', said)


@pytest.mark.parametrize('name, complaint', [('one_pass', 'no HGMMA in the machine code of .*one_pass'),
                                             ('causal_delta', None)])
def test_a_kernel_without_a_matrix_product_fails_the_build_unless_it_has_none_to_do(name, complaint, tmp_path):
    nvcc, source = nvcc_or_skip(), tmp_path / 'x.cu'
    if setup.find_disassembler(nvcc) is None:
        pytest.skip("no cuobjdump or no nvdisasm")
    source.write_text('__global__ void %s(float* x) { x[threadIdx.x] += 1; }' % name)
    with pytest.raises(SystemExit, match=complaint) if complaint else contextlib.nullcontext():
        setup.compile_kernel(nvcc, source, tmp_path / 'x.o')


def test_a_build_that_cannot_look_for_hgmma_says_so(tmp_path, monkeypatch):
    nvcc, source = nvcc_or_skip(), tmp_path / 'x.cu'
    monkeypatch.setattr(setup, 'find_disassembler', lambda nvcc: None)
    source.write_text('__global__ void one_pass(float* x) { x[threadIdx.x] += 1; }')
    assert 'HGMMA is not looked for' in setup.compile_kernel(nvcc, source, tmp_path / 'x.o')


@pytest.fixture
def forgetful():
    """The packages look for their modules anew, before and after."""
    for package in SCRIPTS:
        package._load.cache_clear()
    yield
    for package in SCRIPTS:
        package._load.cache_clear()


@each_package
def test_a_module_that_is_not_there_is_said_with_the_command_that_builds_it(package, forgetful, tmp_path, monkeypatch):
    monkeypatch.setattr(package, 'HERE', tmp_path)
    module, why = package._load()
    assert module is None and 'not built' in why and f'{SCRIPTS[package]} build' in why


@each_package
def test_a_module_of_another_python_is_named(package, forgetful, tmp_path, monkeypatch):
    monkeypatch.setattr(package, 'HERE', tmp_path)
    other = tmp_path / 'build' / 'lib.linux' / f'{package.MODULE}.cpython-27-x86_64-linux-gnu.so'
    other.parent.mkdir(parents=True)
    other.touch()
    module, why = package._load()
    assert module is None and 'another Python' in why and 'cpython-27' in why


@each_package
def test_a_module_that_cannot_be_loaded_is_named(package, forgetful, tmp_path, monkeypatch):
    monkeypatch.setattr(package, 'HERE', tmp_path)
    torn = tmp_path / 'build' / 'lib.linux' / (package.MODULE + setup.sysconfig.get_config_var('EXT_SUFFIX'))
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b'half a module')
    module, why = package._load()
    assert module is None and 'cannot be loaded' in why and '\n' not in why and f'{SCRIPTS[package]} build' in why


@each_package
def test_a_module_older_than_its_sources_is_named(package, forgetful, monkeypatch):
    if package._load()[0] is None:
        pytest.skip(package._load()[1])
    package._load.cache_clear()
    monkeypatch.setattr(package, 'sources_hash', lambda *_: 'of other sources')
    assert 'older than their sources' in package._load()[1]


@each_package
def test_where_it_cannot_run_the_reason_is_one_line(package):
    why = package.why_unavailable()
    assert package.is_available() == (why == '')
    assert '\n' not in why
    if not torch.cuda.is_available():
        assert 'no CUDA device' in why
