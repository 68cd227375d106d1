"""transformers' Trainer for models whose experts are spread over its ranks."""

from __future__ import annotations

import os
from typing import Any, Optional

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from ..errors import IoError, Unsupported
from ..torch import clip_gradients, expert_parameters, ranks
from ..torch.agree import told_to_all
from ..torch.data_parallel import keep_experts_out
from .experts import find_experts
from .loading import from_pretrained
from .optimizer_state import own_state, whole_state
from .replaced import replaced
from .saving import saves_whole

_AnyTrainer: Any = object


class TrainerMixin(_AnyTrainer):  # type: ignore[misc]
    """What Trainer below adds, for trainers of other libraries as well: ``class Mine(TrainerMixin, trl.SFTTrainer)``.

    A model with experts has been through enable or from_pretrained of this package before it comes here, for all ranks
    of the job; others are trained as ever. The dense part is in DistributedDataParallel, the experts are not: their
    gradients are those of the mean loss all the same. Norms of gradients, which clipping goes by, are those of the
    whole model. Checkpoints are those of one process: model, optimizer and all, to be resumed on any number of ranks.
    As passes are collective, batches must be evened out, as they are unless ``accelerator_config`` says otherwise.
    Raises Unsupported (FSDP, DeepSpeed, uneven batches), BadArgument (a model enabled for some of the ranks only).
    """

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if self._spread():
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise Unsupported("experts that are spread over ranks train beside DDP: leave out fsdp and deepspeed")
            if not self.accelerator.even_batches:
                raise Unsupported("a rank with fewer batches holds up all: leave even_batches on in accelerator_config")
            if training:
                keep_experts_out(self.model, ranks.context())
                self.accelerator.clip_grad_norm_ = self._clip
        wrapped: nn.Module = super()._wrap_model(model, training, *args, **kwargs)
        return wrapped

    def _spread(self) -> bool:
        return self.args.world_size > 1 and any(True for _ in expert_parameters(self.model))

    def _clip(self, parameters: object, max_norm: float, norm_type: float = 2.0) -> Tensor:
        if norm_type != 2.0:
            raise Unsupported(f"a norm of type {norm_type}: gradients of experts on several ranks are clipped by type 2")
        return clip_gradients(self.model, max_norm)

    def save_model(self, output_dir: Optional[str] = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model; all ranks call it, as they share the experts.

        Where the folder cannot be made, all of them that share experts with rank 0 raise IoError.
        """
        if saves_whole(self.model):
            folder = output_dir or self.args.output_dir
            if self.args.should_save:
                self._make_folder(folder)
            else:
                self.model.save_pretrained(folder)  # hands in this rank's experts
        super().save_model(output_dir, _internal_call)

    def _make_folder(self, folder: str) -> None:
        """What Trainer does before save_pretrained, where the others are waiting already."""
        module: Any = next(module for _, module in find_experts(self.model))
        with told_to_all(module.expar.context):
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as error:
                raise IoError(str(error)) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = whole_state(self.optimizer, self.model) if self._spread() else self.optimizer.state_dict()
        with replaced(self.optimizer, "state_dict", lambda: state):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Optional[nn.Module] = None) -> None:
        if not self._load_model(model or self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_model(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    @staticmethod
    def _load_model(model: Any, folder: Any) -> bool:
        """Parameters stay the same objects, with the hooks that they have. False: an adapter, or no experts of ours."""
        modules: list[Any] = [module for _, module in find_experts(model)]
        contexts = [module.expar.context for module in modules if hasattr(module, "expar")]
        if not contexts or not isinstance(model, PreTrainedModel):
            return False
        model.load_state_dict(from_pretrained(type(model), folder, context=contexts[0], dtype="auto").state_dict())
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: Optional[str]) -> None:
        if checkpoint is None or not self._spread():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = (os.path.join(checkpoint, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
        if os.path.isfile(optimizer) and os.path.isfile(scheduler):
            # Mapped: of the experts' state this rank reads its own.
            state = torch.load(optimizer, map_location="cpu", weights_only=True, mmap=True)
            self.optimizer.load_state_dict(own_state(self.optimizer, self.model, state))
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))


class Trainer(TrainerMixin, transformers.Trainer):
    """transformers.Trainer, with the same arguments, for a model that is expert-parallel; see TrainerMixin."""
