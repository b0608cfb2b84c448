"""
Builds the kernels of this folder into one Python module, without a GPU and without torch:

    source ThunderKittens/env.src
    cd ThunderKittens/examples/attn_causal && python h100_fwd_setup.py build

Every .cu goes through nvcc and the front end through g++, in parallel, then one link: static cudart, no libcuda.
Needs pybind11 and setuptools, and nvcc: the CUDA toolkit's, or pip install 'cuda-toolkit[nvcc,cccl,cudart]==13.0.*'.
The build fails where ptxas spills a register or serialises wgmma, and where a kernel holds no HGMMA; for that it needs
cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm), and says so where they are missing.
The folders beside this one build and load their kernels with what is here.
"""
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE.parent.parent / 'include'
MODULE = 'h100_attn_causal'
ARCH = ['-gencode', 'arch=compute_90a,code=sm_90a']
NVCC_FLAGS = ['-std=c++20', '-O3', *ARCH, '--expt-relaxed-constexpr', '-lineinfo', '-Xptxas', '-v,--warn-on-spills',
              '-Xcompiler', '-fPIC,-fvisibility=hidden', f'-I{INCLUDE}']
# what ptxas says when it makes wgmma synchronous, waits on its own account, or leaves the registers as they are
SLOW = re.compile(r"are serialized|warpgroup\.wait is injected|'setmaxnreg' ignored")
WITHOUT_MATMUL = re.compile(r'causal_delta|causal_dq_round') # kernels that have none to do
SPILL = re.compile(r'(\d+) bytes spill stores, (\d+) bytes spill loads')


def sources_hash(here=HERE):
    """Hash of all that a folder's module is built from; the module carries it, so that a stale one is noticed."""
    files = [p for p in here.iterdir() if p.suffix in ('.cu', '.cuh', '.cpp')] + list(INCLUDE.rglob('*.cuh'))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b'\0' + path.read_bytes() + b'\0')
    return digest.hexdigest()[:16]


def pip_folders():
    """Where pip puts CUDA's programs."""
    return [Path(folder) / 'nvidia' / 'cu13' / 'bin' for folder in sys.path if folder]


def find_nvcc():
    """Path of nvcc: on the PATH, in the toolkit, or where pip puts it."""
    candidates = [shutil.which('nvcc')]
    candidates += [Path(os.environ[name]) / 'bin' / 'nvcc' for name in ('CUDA_HOME', 'CUDA_PATH') if name in os.environ]
    candidates += [Path('/usr/local/cuda/bin/nvcc')]
    candidates += [folder / 'nvcc' for folder in pip_folders()]
    for path in candidates:
        if path and Path(path).is_file():
            return Path(path)
    sys.exit("no nvcc: install the CUDA toolkit, or pip install 'cuda-toolkit[nvcc,cccl,cudart]==13.0.*'")


def find_pybind11():
    """Include folder of pybind11, its own or the copy in torch."""
    for package in ('pybind11', 'torch'):
        spec = find_spec(package)
        if spec and spec.origin and (Path(spec.origin).parent / 'include' / 'pybind11').is_dir():
            return Path(spec.origin).parent / 'include'
    sys.exit("no pybind11: pip install pybind11")


def run(command, env=None):
    """Output of a command; a failing one ends the build with what it said."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=env)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)}\n{done.stdout}\nbuild failed")
    return done.stdout


def check_ptxas(name, said):
    """End the build on a spill and on what SLOW finds: each makes a kernel slower, some several times, in silence."""
    if SLOW.search(said):
        sys.exit(f"{name}: wgmma is serialised, or registers are not as asked\n{said}")
    if any(int(a) or int(b) for a, b in SPILL.findall(said)):
        sys.exit(f"{name}: registers spill\n{said}")


def find_disassembler(nvcc):
    """The PATH with cuobjdump and nvdisasm, which it calls; None where one of them is not installed."""
    path = os.pathsep.join(map(str, [nvcc.parent, os.environ.get('PATH', ''), *pip_folders()]))
    return path if all(shutil.which(name, path=path) for name in ('cuobjdump', 'nvdisasm')) else None


def machine_code(nvcc, target):
    """What cuobjdump shows of an object file, None where it cannot."""
    path = find_disassembler(nvcc)
    return path and run([shutil.which('cuobjdump', path=path), '-sass', target], env=os.environ | {'PATH': path})


def compile_kernel(nvcc, source, target):
    """One .cu to an object file, checked; returns what ptxas said of registers."""
    said = run([nvcc, *NVCC_FLAGS, '-c', source, '-o', target])
    check_ptxas(source.name, said)
    lines = [line.strip() for line in said.splitlines() if 'Used' in line]
    shown = machine_code(nvcc, target)
    if shown is None:
        lines.append("HGMMA is not looked for: no cuobjdump or no nvdisasm")
    for code in (shown or '').split('Function : ')[1:]:
        name = code.split(maxsplit=1)[0]
        if 'HGMMA' not in code and not WITHOUT_MATMUL.search(name):
            sys.exit(f"{source.name}: no HGMMA in the machine code of {name}")
    return ''.join(f"{source.name}: {line}\n" for line in lines)


def build_module(folder, target, here=HERE):
    """Compile everything in `here` into `target`, objects in `folder`."""
    nvcc, objects = find_nvcc(), []
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor() as pool:
        jobs = []
        for source in sorted(here.glob('*.cu')):
            objects.append(folder / f'{source.stem}.o')
            jobs.append(pool.submit(compile_kernel, nvcc, source, objects[-1]))
        front_end = folder / 'h100_frontend.o'
        objects.append(front_end)
        jobs.append(pool.submit(run, [
            os.environ.get('CXX', 'g++'), '-std=c++20', '-O2', '-fPIC', '-fvisibility=hidden', '-Wall',
            f'-DSOURCES="{sources_hash(here)}"', f'-I{find_pybind11()}', f"-I{sysconfig.get_paths()['include']}",
            '-c', here / 'h100_frontend.cpp', '-o', front_end]))
        for job in jobs:
            print(job.result(), end='')
    libraries = [f'-L{nvcc.parent.parent / name}' for name in ('lib64', 'lib') if (nvcc.parent.parent / name).is_dir()]
    partial = target.with_suffix('.partial')
    run([nvcc, *ARCH, '-shared', '-cudart', 'static', *libraries, *objects, '-o', partial])
    partial.replace(target) # a build that is cut off leaves the old module


def load_module(here, name, sources, build):
    """(module `name` built in `here`, '') or (None, why it cannot be loaded, and the command `build` that helps)."""
    suffix = sysconfig.get_config_var('EXT_SUFFIX')
    found = sorted(here.glob(f'build/lib.*/{name}.*.so'), key=lambda p: p.stat().st_mtime, reverse=True)
    fitting = [path for path in found if path.name == name + suffix]
    if not fitting:
        if found:
            return None, f"the kernels were built for another Python ({found[0].name}, not {suffix}): {build}"
        return None, f"the kernels are not built: {build}"
    loader = ExtensionFileLoader(name, str(fitting[0]))
    try:
        module = module_from_spec(spec_from_loader(name, loader))
        loader.exec_module(module)
    except ImportError as e:
        return None, f"the kernels cannot be loaded ({str(e).splitlines()[0]}): {build}"
    if module.sources != sources:
        return None, f"the kernels are older than their sources: {build}"
    return module, ''


def main(here=HERE, module=MODULE):
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext

    class Build(build_ext):
        def build_extension(self, ext):
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            build_module(Path(self.build_temp).resolve(), target, here)
            print(f"built {target}")

    os.chdir(here)
    setup(name=module, version='1', ext_modules=[Extension(module, [])], cmdclass={'build_ext': Build}, packages=[],
          py_modules=[])


if __name__ == '__main__':
    main()
