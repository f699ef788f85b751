"""`learnables sweep` over the architectures of real timm and transformers, on the meta device."""

import json
import re

import pytest

from learnables.entries import entries
from learnables.errors import ArgumentError, LearnablesError, SelectionError
from learnables.integrations.architectures import LIBRARIES
from learnables.integrations.sweep import run_sweep, sweep
from learnables.policy.groups import param_groups

# (owner's class, local name) of what people write by hand and nobody should pull toward zero:
# written down from the models themselves, without our table of kinds.
BY_HAND = re.compile(
    r"\.(cls_token|class_token|dist_token|distillation_token|reg_token|register_tokens|mask_token"
    r"|pos_embed|position_embeddings?|pos_embed[123]|abs_pos|relative_position_bias_table|rel_pos_[hw]"
    r"|logit_scale|logit_bias|temperature|latent|sinks?|A_log|dt_bias|layer_scale_?[12]?|lambda1"
    r"|q_bias|v_bias|level_embed)$"
    r"|^(LayerScale2?d?|\w*LayerScale)\.(gamma|weight|lambda1|scale)$"
    r"|^(LayerNorm\w*|RMSNorm|\w+RMSNorm|\w+LayerNorm|BatchNorm\d?d?|GroupNorm\w*)\.(weight|bias)$"
)


def test_timm_decays_what_it_lists_nowhere_and_we_do_not():
    seen = sweep("timm", ["xcit_nano_12_p8_224", "samvit_base_patch16"], decay=True)
    assert seen.audited == ["samvit_base_patch16", "xcit_nano_12_p8_224"]
    assert seen.ok
    theirs = {f"{d.owner}.{d.local_name}" for d in seen.decay if d.decayed_by == "theirs"}
    assert theirs >= {"XCA.temperature", "Attention.rel_pos_h", "Attention.rel_pos_w"}
    assert "XCA.temperature (scale): 12 in xcit_nano_12_p8_224" in str(seen)
    line, *_ = [line for line in str(seen).splitlines() if line.startswith("    xcit_nano_12")]
    mine = [d for d in seen.decay if d.decayed_by == "theirs" and "xcit_nano_12_p8_224" in d.models]
    total = sum(d.in_each["xcit_nano_12_p8_224"] for d in mine)
    assert line.startswith(f"    xcit_nano_12_p8_224: {total} (12 XCA.temperature")
    assert all(sum(d.in_each.values()) == d.parameters for d in seen.decay)


def test_the_trainers_rule_decays_the_class_token():
    seen = sweep("transformers", ["vit", "imagegpt"], decay=True)
    assert seen.audited == ["imagegpt", "vit"]
    (row,) = [d for d in seen.decay if d.local_name == "cls_token"]
    assert (row.kind, row.decayed_by, row.models) == ("token", "theirs", ("vit",))
    assert {f["code"] for f in seen.findings} == {"LRN504"}  # torch.Tensor(n) in a norm of its own
    assert "h.0.ln_1.weight" in [name for f in seen.findings for name in f["where"]]


def test_the_exit_code_and_the_formats(capsys, tmp_path):
    assert run_sweep("timm", ["vit_tiny_patch16_224"]) == 0
    assert "1 architectures audited" in capsys.readouterr().out
    assert run_sweep("timm", ["vit_tiny_patch16_224"], format="json", output=tmp_path / "s") == 0
    assert json.loads((tmp_path / "s").read_text())["audited"] == ["vit_tiny_patch16_224"]
    assert run_sweep("transformers", ["vision-encoder-decoder"]) == 2  # no default of its own
    with pytest.raises(LearnablesError, match="library is unknown"):
        run_sweep("torchvision")
    with pytest.raises(SelectionError, match="vit_tiny"):
        run_sweep("timm", ["vit_tinny*"])
    with pytest.raises(LearnablesError, match="no such format"):
        run_sweep("timm", format="yaml")


def test_one_glob_is_one_and_what_is_none_is_refused():
    assert sweep("timm", "xcit_nano_12_p8_224").audited == ["xcit_nano_12_p8_224"]
    with pytest.raises(ArgumentError, match="where: patterns"):
        sweep("timm", [3])
    with pytest.raises(ArgumentError, match="where: decay"):
        sweep("timm", "xcit_nano_12_p8_224", decay="yes")
    for wrong in (None, ["timm"], "Timm"):
        with pytest.raises(LearnablesError, match="timm, transformers"):
            sweep(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_that_people_write_by_hand_is_decayed_in_any_architecture(library):
    met, wrong = 0, []
    for architecture in LIBRARIES[library]().architectures(()):
        try:
            model = architecture.build()
        except Exception:
            continue
        groups = param_groups(model, lr=1e-3, weight_decay=0.05)
        decayed = {name for g in groups if g["weight_decay"] for name in g["param_names"]}
        for entry in entries(model):
            name = f"{type(entry.owner).__name__}.{entry.local_name}"
            if BY_HAND.search(name):
                met += 1
                if entry.name in decayed:
                    wrong.append(f"{architecture.name}: {name} {tuple(entry.shape)}")
    assert met > 5000
    assert not wrong
