"""A user's own --user-dir, which brings GradInit along, with pieces that are unusual or wrong."""

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerEncoder,
    TransformerModel,
    transformer_iwslt_de_en,
)
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

import fairseq_gradinit  # noqa: F401


@register_criterion("no_sample_size")
class NoSampleSize(CrossEntropyCriterion):
    def forward(self, model, sample, reduce=True):
        loss, _, log = super().forward(model, sample, reduce)
        return loss, None, log


@register_criterion("nan_loss")
class NanLoss(CrossEntropyCriterion):
    def forward(self, model, sample, reduce=True):
        loss, size, log = super().forward(model, sample, reduce)
        return loss * float("nan"), size, log


@register_criterion("with_parameters")
class WithParameters(CrossEntropyCriterion):
    """Also gives its loss as a vector of one, and its sample size as a tensor."""

    def __init__(self, task, sentence_avg):
        super().__init__(task, sentence_avg)
        self.temperature = torch.nn.Parameter(torch.full((1,), 1.5))

    def forward(self, model, sample, reduce=True):
        loss, size, log = super().forward(model, sample, reduce)
        return loss * self.temperature, torch.tensor(size), log


@register_task("task_registered_later", dataclass=TranslationConfig)
class TaskRegisteredLater(TranslationTask):
    """Registered through a name that was imported before the plugin was."""


@register_task("task_with_its_own_optimizer_steps", dataclass=TranslationConfig)
class TaskWithItsOwnOptimizerSteps(TranslationTask):
    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        optimizer.zero_grad()
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)


@register_model("half_frozen_transformer")
class HalfFrozenTransformer(TransformerModel):
    @classmethod
    def build_model(cls, args, task):
        model = super().build_model(args, task)
        model.encoder.requires_grad_(False)
        return model


register_model_architecture("half_frozen_transformer", "half_frozen_transformer")(
    transformer_iwslt_de_en
)


class OwnLayer(TransformerEncoderLayerBase):
    """Neither its attention nor its feed-forward network is of linear layers of fairseq's names."""

    def build_fc1(self, *args):
        return torch.nn.Sequential(super().build_fc1(*args))

    def build_self_attention(self, embed_dim, cfg):
        return torch.nn.Bilinear(embed_dim, embed_dim, embed_dim)

    def forward(self, x, encoder_padding_mask, attn_mask=None):
        return self.final_layer_norm(x + self.fc2(self.fc1(self.self_attn(x, x)).relu()))


class EncoderOfOwnLayers(TransformerEncoder):
    def build_encoder_layer(self, args):
        return OwnLayer(TransformerConfig.from_namespace(args))


@register_model("transformer_of_own_layers")
class TransformerOfOwnLayers(TransformerModel):
    @classmethod
    def build_encoder(cls, args, src_dict, embed_tokens):
        return EncoderOfOwnLayers(args, src_dict, embed_tokens)


register_model_architecture("transformer_of_own_layers", "transformer_of_own_layers")(
    transformer_iwslt_de_en
)
