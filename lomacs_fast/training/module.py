"""The LightningModule and LightningDataModule: what a step computes, and which samples it sees."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lomacs_fast.data.datasets import Batch, Pairs, TrainingPairs, epoch_order, split
from lomacs_fast.metrics import ae_terms
from lomacs_fast.nn import AEPlusLoss, LoMACSSVDNet

from .checkpoints import describe, write_checkpoint
from .config import TrainConfig
from .schedules import cosine


class SVDNetModule(L.LightningModule):
    """Trains a `LoMACSSVDNet` with the AE+ loss against clean labels, by the schedules of a `TrainConfig`."""

    def __init__(self, net: LoMACSSVDNet, config: TrainConfig, scenarios: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.config, self.scenarios = net, config, scenarios
        self.loss = AEPlusLoss(config.match)
        self._last_loss: Tensor | None = None
        self._seen = self._empty = 0
        self._validation = torch.zeros(4, dtype=torch.float64)
        for name in ("lam", "w_energy", "w_diag", "w_match"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64), persistent=False)

    @property
    def progress(self) -> float:
        """Share of the run that is done, in whole epochs; 1 all the time while finetuning."""
        return 1.0 if self.config.finetune else self.current_epoch / self.config.max_epochs

    def configure_optimizers(self) -> Any:
        c = self.config
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=c.lr, weight_decay=c.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: cosine(c.lr, c.min_lr, epoch / c.max_epochs) / c.lr
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def _apply_schedule(self) -> dict[str, float]:
        values = self.config.schedule.at(self.progress)
        self.net.set_tau_s(values["tau_s"])
        for name in ("lam", "w_energy", "w_diag", "w_match"):
            getattr(self, name).fill_(values[name])
        return values

    def on_train_start(self) -> None:
        self._apply_schedule()  # a run resumed within an epoch does not start that epoch again

    def on_train_epoch_start(self) -> None:
        values = self._apply_schedule()
        self.log_dict({"schedule/lam": values["lam"], "schedule/tau_s": values["tau_s"]})

    def on_train_epoch_end(self) -> None:
        if self._empty and not self._seen:
            raise ValueError(f"all training samples of epoch {self.current_epoch} are zero channels")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._seen += len(batch.sid)
        if not len(batch.sid):  # only zero channels: a step without a gradient keeps the count of steps
            self._empty += 1
            return sum(((p * 0).sum() for p in self.net.parameters()), torch.zeros(()))
        U, S, V, _ = self.net(batch.input, batch.sid)
        loss = self.loss(U, S, V, batch.label, self.w_energy, self.w_diag, self.w_match, self.lam)
        self._last_loss = loss.detach()
        # reading the loss waits for the device: every step only where that costs nothing
        if loss.device.type == "cpu" or self.global_step % self.config.log_every == 0:
            self._refuse_nonfinite(batch_idx)
        assert self.loss.terms is not None
        values = {f"train/{name}": value for name, value in self.loss.terms._asdict().items()}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(S), sync_dist=True)
        self.log(
            "train/loss",
            loss,
            on_step=True,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(S),
            sync_dist=True,
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        self._validation.zero_()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        U, S, V, _ = self.net(batch.input, batch.sid)
        sums = [term.sum() for term in ae_terms(U, S, V, batch.label)]
        self._validation += torch.stack([*sums, sums[0].new_tensor(len(S))]).to(self._validation)

    def on_validation_epoch_end(self) -> None:
        # sums over processes that may hold different numbers of samples
        total = self.trainer.strategy.reduce(self._validation.to(self.device), reduce_op="sum")
        rec, ortho_u, ortho_v = (total[:3] / total[3]).tolist()
        self.log_dict({"val/rec": rec, "val/ortho_u": ortho_u, "val/ortho_v": ortho_v}, sync_dist=False)
        self.log("val/ae", rec + ortho_u + ortho_v, prog_bar=True, sync_dist=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._refuse_nonfinite(None)
        if not all(bool(p.isfinite().all()) for p in self.net.parameters()):
            raise FloatingPointError(
                f"a weight became non-finite before step {self.global_step} (epoch {self.current_epoch}); "
                "training stopped, the last checkpoint is kept: lower the learning rate or look at the data"
            )
        checkpoint["lomacs_fast"] = describe(self.net, self.scenarios, training=self.config.to_dict())

    def _refuse_nonfinite(self, batch_idx: int | None) -> None:
        loss = self._last_loss
        if loss is not None and not bool(loss.isfinite()):
            where = f"step {self.global_step} (epoch {self.current_epoch}"
            where += ")" if batch_idx is None else f", batch {batch_idx})"
            raise FloatingPointError(
                f"the loss became {loss.item()} at {where}; training stopped, the last checkpoint is kept: "
                "lower the learning rate or look at the data"
            )


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This process's share of every batch of an epoch, as `(epoch, index)` keys.

    Epoch and first batch follow from the number of optimiser steps done, so that a resumed run goes on with
    the very batch that a killed one would have seen next. A last batch that the processes cannot share
    evenly loses its remainder.
    """

    def __init__(
        self,
        indices: list[int],
        *,
        batch_size: int,
        seed: int,
        steps_done: Callable[[], int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % world:
            raise ValueError(f"batch_size must be a multiple of the {world} processes, got {batch_size}")
        if len(indices) < world:
            raise ValueError(f"{len(indices)} training samples, expected at least one a process ({world})")
        self._indices, self._batch_size, self._seed = indices, batch_size, seed
        self._steps_done, self._rank, self._world = steps_done, rank, world

    def __len__(self) -> int:
        full, rest = divmod(len(self._indices), self._batch_size)
        return full + (rest >= self._world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self._steps_done(), len(self))
        order = epoch_order(self._indices, seed=self._seed, epoch=epoch)
        for k in range(first, len(self)):
            batch = order[k * self._batch_size : (k + 1) * self._batch_size]
            batch = batch[: len(batch) // self._world * self._world]
            yield [(epoch, index) for index in batch[self._rank :: self._world]]


class ResumableLoader(DataLoader[Batch]):
    """A loader without state of its own: its sampler knows from the step count where to go on."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _as_it_is(batch: Any) -> Any:
    return batch


class ChannelData(L.LightningDataModule):
    """Training and validation batches of a collection of pairs."""

    def __init__(self, pairs: Pairs, config: TrainConfig) -> None:
        super().__init__()
        self.pairs, self.config = pairs, config
        self.training, self.validation = split(pairs, config.val_fraction, config.seed)

    def _loader(self, data: TrainingPairs, batches: Any) -> DataLoader[Batch]:
        workers = self.config.num_workers
        return ResumableLoader(
            data,
            batch_sampler=batches,
            collate_fn=_as_it_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        c, trainer = self.config, self.trainer
        assert trainer is not None
        data = TrainingPairs(self.pairs, seed=c.seed, augmentation=c.augmentation, skip_zeros=True)
        batches = EpochBatches(
            self.training,
            batch_size=c.batch_size,
            seed=c.seed,
            steps_done=lambda: trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )
        return self._loader(data, batches)

    def val_dataloader(self) -> DataLoader[Batch]:
        trainer = self.trainer
        assert trainer is not None
        if len(self.validation) < trainer.world_size:
            raise ValueError(
                f"{len(self.validation)} validation samples, expected at least one a process "
                f"({trainer.world_size}): raise val_fraction"
            )
        mine = self.validation[trainer.global_rank :: trainer.world_size]
        size = self.config.batch_size
        keys = [[(0, i) for i in mine[k : k + size]] for k in range(0, len(mine), size)]
        return self._loader(TrainingPairs(self.pairs, seed=self.config.seed), keys)


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint for runs that may be killed at any moment, moved, or copied.

    The last step of an epoch is not saved as a step: the end of the epoch is, after its validation. A run
    that was moved still knows its best, in the folder it is in.
    """

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        folder = self.dirpath

        def here(path: str) -> str:
            return os.path.join(folder or "", os.path.basename(path)) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        state = state_dict | {name: here(state_dict[name]) for name in paths}
        best = {here(path): value for path, value in state_dict["best_k_models"].items()}
        super().load_state_dict(state | {"dirpath": folder, "best_k_models": best})


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoints that replace each other only when whole, and load with `weights_only=True`."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        os.remove(path)
