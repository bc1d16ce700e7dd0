"""The published network as a user might have it in a file of their own: other code, same names and shapes."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class AxialLowRankFreqGate(nn.Module):
    def __init__(self, M, N, hidden=32, temperature=0.2):
        super().__init__()
        self.temp = temperature
        self.row_mlp = nn.Sequential(
            nn.Linear(M, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, M, bias=False)
        )
        self.col_mlp = nn.Sequential(
            nn.Linear(N, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, N, bias=False)
        )

    def forward(self, Hf):
        mag = Hf.abs()
        logits = self.row_mlp(mag.mean(2))[:, :, None] + self.col_mlp(mag.mean(1))[:, None, :]
        return torch.sigmoid(logits / self.temp)


class GroupedProjectedAttention(nn.Module):
    def __init__(self, dim, att_dim, groups, seq_len, k_len):
        super().__init__()
        g = dim // groups
        self.scale = 1 / math.sqrt(att_dim)
        self.qs = nn.ModuleList([nn.Linear(g, att_dim, bias=False) for _ in range(groups)])
        self.ks = nn.ModuleList([nn.Linear(g, att_dim, bias=False) for _ in range(groups)])
        self.vs = nn.ModuleList([nn.Linear(g, g, bias=False) for _ in range(groups)])
        self.os = nn.ModuleList([nn.Linear(g, g, bias=False) for _ in range(groups)])
        self.Pk = nn.ParameterList(
            [nn.Parameter(torch.randn(seq_len, k_len) / seq_len**0.5) for _ in range(groups)]
        )
        self.Pv = nn.ParameterList(
            [nn.Parameter(torch.randn(seq_len, k_len) / seq_len**0.5) for _ in range(groups)]
        )

    def forward(self, x):
        out = []
        for i, part in enumerate(torch.chunk(x, len(self.qs), dim=-1)):
            k = torch.einsum("btc,tk->bkc", self.ks[i](part), self.Pk[i])
            v = torch.einsum("btc,tk->bkc", self.vs[i](part), self.Pv[i])
            weights = torch.softmax(torch.einsum("btc,bkc->btk", self.qs[i](part), k) * self.scale, -1)
            out.append(self.os[i](weights @ v))
        return torch.cat(out, -1)


class GatedConv1D(nn.Module):
    def __init__(self, dim, k=5):
        super().__init__()
        self.dw = nn.Conv1d(dim, 2 * dim, k, groups=dim, padding=k // 2)
        self.pw = nn.Conv1d(dim, dim, 1)

    def forward(self, x):
        value, gate = self.dw(x.transpose(1, 2)).chunk(2, dim=1)
        return self.pw(value * gate.sigmoid()).transpose(1, 2)


class NeuralOrthoRefiner(nn.Module):
    def __init__(self, init_scale=0.1, max_scale=0.5):
        super().__init__()
        raw = math.log(init_scale / max_scale / (1 - init_scale / max_scale))
        self.max_scale = max_scale
        self.a_raw = nn.Parameter(torch.tensor(raw))
        self.b_raw = nn.Parameter(torch.tensor(raw))

    def step(self, X, a):
        G = X.mH @ X - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        X = X - a * X @ ((G + G.mH) / 2)
        return X / (X.abs().square().sum(-2, keepdim=True).sqrt() + 1e-8)

    def forward(self, U, V):
        a, b = (self.max_scale * torch.sigmoid(raw) for raw in (self.a_raw, self.b_raw))
        return self.step(U, a), self.step(V, b)


class LowMACS_SVDNet(nn.Module):
    def __init__(
        self, M, N, r, n_scene, dim=64, depth=2, groups=4, kernel_size=3, k_len=32, tau_s=0.9, hidden=32
    ):
        super().__init__()
        self.M, self.N, self.r, self.tau_s = M, N, r, tau_s
        self.freq_gate = AxialLowRankFreqGate(M, N, hidden)
        self.input_proj = nn.Linear(4 * N, dim)
        self.pos = nn.Parameter(torch.randn(1, M, dim) / 10)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            mixer = (
                GatedConv1D(dim, kernel_size)
                if i % 2
                else GroupedProjectedAttention(dim, min(r, 32), groups, M, k_len)
            )
            self.blocks.append(nn.Sequential(nn.LayerNorm(dim), mixer))
        self.norm = nn.LayerNorm(dim)
        self.scene_emb = nn.Embedding(n_scene, dim)
        self.u_head = nn.Linear(dim, 2 * M * r)
        self.v_head = nn.Linear(dim, 2 * N * r)
        self.s_head = nn.Sequential(nn.Linear(dim, r), nn.Softplus())
        self.ortho_refine = NeuralOrthoRefiner()

    def set_tau_s(self, tau):
        self.tau_s = tau

    def forward(self, H, sid):
        Hf = torch.fft.fft2(H, norm="ortho")
        Hd = torch.fft.ifft2(Hf * self.freq_gate(Hf), norm="ortho")
        planes = torch.view_as_real(Hd).permute(0, 3, 1, 2)
        coarse = F.interpolate(
            F.avg_pool2d(planes, 2), size=Hd.shape[-2:], mode="bilinear", align_corners=False
        )
        x = torch.cat([y.permute(0, 2, 3, 1).flatten(2) for y in (planes, coarse)], -1)
        x = self.input_proj(x) + self.pos
        for block in self.blocks:
            x = x + block(x)
        feat = self.norm(x.mean(1)) + self.scene_emb(sid)
        U = torch.view_as_complex(self.u_head(feat).view(-1, self.M, self.r, 2))
        V = torch.view_as_complex(self.v_head(feat).view(-1, self.N, self.r, 2))
        U, V = (X / (torch.linalg.vector_norm(X, dim=1, keepdim=True) + 1e-8) for X in (U, V))
        s, order = torch.sort(self.s_head(feat) + 1e-6, descending=True, stable=True)
        U, V = (torch.gather(X, 2, order[:, None, :].expand_as(X)) for X in (U, V))
        U, V = self.ortho_refine(U, V)
        measured = torch.diagonal(U.mH @ Hd @ V, dim1=1, dim2=2).abs()
        return U, (1 - self.tau_s) * s + self.tau_s * measured + 1e-6, V, Hd


class AEPlusLoss(nn.Module):
    def forward(self, U, S, V, H, wE, wD, wS, lam):
        def norm(x):
            return torch.linalg.vector_norm(x, dim=(1, 2))

        size = norm(H) + 1e-8
        eye = torch.eye(S.shape[1], dtype=H.dtype, device=H.device)
        core = U.mH @ H @ V
        diagonal = torch.diagonal(core, dim1=1, dim2=2)
        rec = norm(H - (U * S[:, None]) @ V.mH) / size
        ortho = norm(U.mH @ U - eye) + norm(V.mH @ V - eye)
        energy = 1 - norm(core) / size
        off = norm(core - torch.diag_embed(diagonal)) / size
        match = (S - diagonal.abs()).abs().mean(1) / size
        return (rec + lam * ortho + wE * energy + wD * off + wS * match).mean()
