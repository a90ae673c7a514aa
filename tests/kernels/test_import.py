import subprocess
import sys


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_does_not_import_torch():
    run("import sys, kernels, kernels.dispatch\nassert 'torch' not in sys.modules")


def test_transformers_works_beside_a_package_of_the_name_kernels():
    run(
        "import kernels, torch\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16,\n"
        "    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)\n"
        "logits = LlamaForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits\n"
        "assert logits.shape == (1, 3, 32)\n"
    )
