"""What an installed wheel must do on a machine without a compiler: `python tests/smoke.py [cpp | eager]`.

Run outside of the checkout, so that the installation is what is imported.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import lomacs_fast
from lomacs_fast import reference


def main(backend: str) -> None:
    package = Path(lomacs_fast.__file__).parent
    assert "site-packages" in package.parts, f"imported from {package}, not from an installation"
    torch.manual_seed(0)
    net = lomacs_fast.LoMACSSVDNet(M=16, N=12, r=4, n_scene=2)
    twin = reference.LoMACSSVDNet(M=16, N=12, r=4, n_scene=2)
    twin.load_state_dict(net.state_dict())
    H = torch.randn(6, 16, 12, dtype=torch.complex64)
    H = H / torch.linalg.matrix_norm(H)[:, None, None]
    sid = torch.zeros(6, dtype=torch.long)
    weights = {"w_energy": 0.4, "w_diag": 0.3, "w_match": 0.3, "lam": 0.35}
    # asked for by name a backend serves or raises: no silent fallback
    with lomacs_fast.use_backend(backend):
        U, S, V, _ = net(H, sid)
        loss = lomacs_fast.AEPlusLoss()(U, S, V, H, **weights)
        loss.backward()
        frozen = lomacs_fast.freeze(net)
        factors = frozen(H, 0)
        with tempfile.TemporaryDirectory() as folder:
            frozen.save(Path(folder) / "net.npz")
            again = lomacs_fast.FrozenSVDNet.load(Path(folder) / "net.npz")
            assert torch.equal(again(H, 0)[1], factors[1])
    expected = reference.AEPlusLoss()(*twin(H, sid)[:3], H, **weights)
    assert torch.allclose(loss, expected, rtol=1e-4)
    assert all(p.grad is not None for p in net.parameters())
    assert torch.allclose(factors[1], S, rtol=1e-3)
    subprocess.run([Path(sys.executable).with_name("lomacs-fast"), "info"], check=True)
    print(f"smoke test passed: {backend}, {package}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpp")
