"""Grafts in vision models beside hand-written forwards: pooling, other image sizes, biases."""

import copy
import pickle

import pytest
import torch

import learnables as ln
from learnables.errors import LearnablesError, ShapeError
from learnables.grafting.graft import grafts_of

STRONG = ln.init.normal(1.0)
SIZES = {"embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}
SEES = {**SMALL, "image_size": 32, "patch_size": 8}
READS = {**SMALL, "vocab_size": 64, "max_position_embeddings": 16}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def of_timm(name="vit_tiny_patch16_224", **more):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, **{**SIZES, **more}).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def embedded(model, x):
    """What goes into the first block of a timm ViT."""
    x = model._pos_embed(model.patch_embed(x))
    return model.norm_pre(model.patch_drop(x))


def answer(model, x):
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("side", [32, 64])
def test_pooling_and_resized_positions_know_the_tokens_they_knew(pool, side):
    model = of_timm(img_size=32, dynamic_img_size=True, global_pool=pool)
    x = torch.randn(2, 3, side, side)
    registers, deep = ln.nn.RegisterTokens(2, 48), ln.nn.DeepPrompts(3, 4, 48, 1, init=STRONG)
    with torch.no_grad():
        before = model(x)
        tokens = registers(embedded(model, x))
        for layer, block in enumerate(model.blocks):
            tokens = block(deep(tokens, layer))
        tokens = torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1)  # without the prompts
        wanted = answer(model, tokens[:, 2:])  # and without the registers in front
        first = ln.graft(model, "registers", registers)
        second = ln.graft(model, "prompts", deep)
        torch.testing.assert_close(model(x), wanted)
        assert (wanted - before).abs().max() > 1e-3
        second.remove()
        first.remove()
        assert torch.equal(model(x), before)


def test_a_model_that_is_given_another_image_size_afterwards_keeps_its_graft():
    model = of_timm(img_size=32)
    ln.graft(model, "prompts", ln.nn.Prompts(4, 48, prefix=1, init=STRONG))
    other = of_timm(img_size=32)
    other.load_state_dict({n: v for n, v in model.state_dict().items() if "prompts" not in n})
    for one in (model, other):
        one.set_input_size(img_size=64)
    ln.graft(other, "prompts", model.prompts)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("side", [32, 48])
def test_transformers_interpolates_positions_beside_a_graft(side):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    model, x = ViTModel(config).eval(), torch.randn(2, 3, side, side)
    prompts = ln.nn.Prompts(4, 48, prefix=1, init=STRONG)
    with torch.no_grad():
        plain = model(x, interpolate_pos_encoding=True).last_hidden_state
        tokens = prompts(model.embeddings(x, interpolate_pos_encoding=True))
        for layer in model.layers:
            tokens = layer(tokens)
        tokens = model.layernorm(tokens)
        ln.graft(model, "prompts", prompts)
        ours = model(x, interpolate_pos_encoding=True)
        assert ours.last_hidden_state.shape == plain.shape
        wanted = torch.cat([tokens[:, :1], tokens[:, 5:]], dim=1)
        torch.testing.assert_close(ours.last_hidden_state, wanted)
        torch.testing.assert_close(ours.pooler_output, model.pooler(wanted))


LOOKED_AT = {
    "prompts": lambda n: [ln.nn.Prompts(4, 48, prefix=1, init=STRONG)],
    "deep": lambda n: [ln.nn.DeepPrompts(n, 4, 48, 1, init=STRONG)],
    "two": lambda n: [
        ln.nn.RegisterTokens(2, 48, init=STRONG),
        ln.nn.DeepPrompts(n, 3, 48, prefix=3, init=STRONG),
    ],
}


def between(components, blocks, tokens):
    """By hand: what is between the blocks, without the tokens that were put in."""
    states = []
    for layer, block in enumerate(blocks):
        for component in components:
            if isinstance(component, ln.nn.DeepPrompts):
                tokens = component(tokens, layer)
            elif layer == 0:
                tokens = component(tokens)
        tokens = block(tokens)
        left = tokens
        for component in reversed(components):
            first, count = getattr(component, "prefix", 0), component.tokens.shape[1]
            left = torch.cat([left[:, :first], left[:, first + count :]], dim=1)
        states.append(left)
    return states


@pytest.mark.parametrize("kind", LOOKED_AT)
def test_intermediates_of_timm_are_sequences_that_the_model_knows(kind):
    model, x = of_timm(img_size=32), torch.randn(2, 3, 32, 32)
    components = LOOKED_AT[kind](3)
    with torch.no_grad():
        plain = model.forward_intermediates(x)
        names = [vars(module).keys() for module in model.modules()]
        states = between(components, model.blocks, embedded(model, x))
        maps = [state[:, 1:].mT.unflatten(-1, (2, 2)) for state in states]
        normed = [model.norm(state)[:, 1:] for state in states]
        handles = [ln.graft(model, f"g{i}", made) for i, made in enumerate(components)]
        for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            last, found = one.forward_intermediates(x)
            torch.testing.assert_close(found, maps)
            torch.testing.assert_close(last, model.norm(states[-1]))
            torch.testing.assert_close(one.forward_features(x), last)
            some = one.get_intermediate_layers(x, n=[0, 2], norm=True)
            torch.testing.assert_close(list(some), [normed[0], normed[2]])
            early = one.forward_intermediates(x, indices=[1], stop_early=True)[1]
            torch.testing.assert_close(early, [maps[1]])
            torch.testing.assert_close(one.forward_features(x), last)
        compiled = torch.compile(model.forward_intermediates, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[1], maps)
        for handle in reversed(handles):
            handle.remove()
        assert [vars(module).keys() for module in model.modules()] == names
        assert all(map(torch.equal, model.forward_intermediates(x)[1], plain[1]))


def test_a_pyramid_of_features_is_one_with_grafts_too():
    import timm

    model, x = of_timm(img_size=32), torch.randn(2, 3, 32, 32)
    prompts = ln.nn.Prompts(4, 48, prefix=1, init=STRONG)
    body = {k: v for k, v in SIZES.items() if k != "num_classes"}
    options = {**body, "img_size": 32, "features_only": True}
    pyramid = timm.create_model("vit_tiny_patch16_224", **options).eval()
    kept = {n: v for n, v in model.state_dict().items() if not n.startswith("head.")}
    pyramid.model.load_state_dict(kept, strict=False)
    with torch.no_grad():
        plain = pyramid(x)
        ln.graft(model, "prompts", prompts)
        handle = ln.graft(pyramid, "prompts", prompts)
        wanted = model.forward_intermediates(x, norm=False)[1]
        torch.testing.assert_close(pyramid(x), wanted)
        handle.remove()
        assert all(map(torch.equal, pyramid(x), plain))


@pytest.mark.parametrize("kind", LOOKED_AT)
@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("hooked", ["before", "after"])
def test_hidden_states_of_transformers_are_sequences_that_the_model_knows(kind, as_tuple, hooked):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SEES)).eval()
    x, components = torch.randn(2, 3, 32, 32), LOOKED_AT[kind](2)
    told = {"output_hidden_states": True, "return_dict": not as_tuple}
    with torch.no_grad():
        if hooked == "before":  # transformers puts its hooks in at the first of such calls
            model(x, **told)
        begin = model.vit.embeddings(x)
        states = between(components, model.vit.layers, begin)
        for i, made in enumerate(components):
            ln.graft(model, f"g{i}", made)
        copies = [copy.deepcopy(model)]
        if hooked == "after":  # its hooks cannot be pickled
            copies.append(pickle.loads(pickle.dumps(model)))
        for one in (model, *copies):
            out = one(x, **told)
            found = out[-1] if as_tuple else out.hidden_states
            torch.testing.assert_close(found[0], begin)
            torch.testing.assert_close(found[1], states[0])
            torch.testing.assert_close(found[2], states[1])
            logits = out[0] if as_tuple else out.logits
            torch.testing.assert_close(one(x).logits, logits)
        model.config.output_hidden_states = True
        assert {state.shape for state in model(x).hidden_states} == {begin.shape}


@pytest.mark.parametrize("kind", LOOKED_AT)
def test_a_backbone_of_transformers_makes_maps_of_what_it_knows(kind):
    from transformers import Dinov2Backbone, Dinov2Config

    torch.manual_seed(0)
    config = Dinov2Config(**SEES, out_features=["stage1", "stage2"])
    model, x = Dinov2Backbone(config).eval(), torch.randn(2, 3, 32, 32)
    components = LOOKED_AT[kind](2)
    with torch.no_grad():
        states = between(components, model.encoder.layer, model.embeddings(x))
        wanted = [model.layernorm(s)[:, 1:].mT.unflatten(-1, (4, 4)) for s in states]
        for i, made in enumerate(components):
            ln.graft(model, f"g{i}", made)
        torch.testing.assert_close(list(model(x).feature_maps), wanted)
    stem = Dinov2Backbone(Dinov2Config(**SEES, out_features=["stem", "stage2"]))
    ln.graft(stem, "prompts", ln.nn.Prompts(4, 48, prefix=1))
    with pytest.raises(LearnablesError, match="the stem's feature map"):
        stem(x)


def test_what_is_between_checkpointed_blocks_is_refused_where_gradients_are_asked_for():
    model, x = of_timm(img_size=32), torch.randn(2, 3, 32, 32)
    ln.graft(model, "prompts", ln.nn.Prompts(4, 48, prefix=1, init=STRONG))
    model.set_grad_checkpointing()
    with pytest.raises(LearnablesError, match="between checkpointed blocks"):
        model.forward_intermediates(x)
    with torch.no_grad():
        maps = model.forward_intermediates(x)[1]
    model.set_grad_checkpointing(False)
    with_grad = model.forward_intermediates(x)[1]
    torch.testing.assert_close(with_grad, maps)
    with_grad[-1].square().sum().backward()
    assert model.prompts.tokens.grad.any()


def test_a_look_that_failed_leaves_nothing_behind():
    model, x = of_timm(img_size=32), torch.randn(2, 3, 32, 32)
    ln.graft(model, "prompts", ln.nn.Prompts(4, 48, prefix=1, init=STRONG))
    with torch.no_grad():
        wanted, out = model.forward_intermediates(x)[1], model(x)

        def fail(*_):
            raise KeyboardInterrupt

        handle = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.forward_intermediates(x)
        handle.remove()
        assert torch.equal(model(x), out)
        assert all(map(torch.equal, model.forward_intermediates(x)[1], wanted))


@pytest.mark.parametrize("fused", [True, False])
def test_a_relative_bias_is_added_to_every_attention(fused):
    model = of_timm(img_size=64)
    for block in model.blocks:
        block.attn.fused_attn = fused
    x, bias = torch.randn(2, 3, 64, 64), ln.nn.RelativeBias(4, 3, prefix=1, init=STRONG)
    with torch.no_grad():
        plain, wanted = model(x), model(x, attn_mask=bias.bias()[None])
        handle = ln.graft(model, "relative", bias)
        torch.testing.assert_close(model(x), wanted)
        assert (wanted - plain).abs().max() > 1e-3
        handle.remove()
        assert torch.equal(model(x), plain)


@pytest.mark.parametrize("order", ["bias first", "tokens first"])
def test_tokens_that_were_put_in_get_no_bias(order):
    model = of_timm(img_size=64)
    x, bias = torch.randn(2, 3, 64, 64), ln.nn.RelativeBias(4, 3, prefix=1, init=STRONG)
    registers, prompts = ln.nn.RegisterTokens(2, 48), ln.nn.Prompts(3, 48, prefix=3, init=STRONG)
    with torch.no_grad():
        padded = torch.zeros(3, 22, 22)
        old = torch.tensor([2, *range(6, 22)])  # registers 0, 1; class token 2; prompts 3 … 5
        padded[:, old[:, None], old] = bias.bias()
        tokens = prompts(registers(embedded(model, x)))
        for block in model.blocks:
            tokens = block(tokens, attn_mask=padded[None])
        wanted = answer(model, tokens[:, old])
        if order == "bias first":
            ln.graft(model, "relative", bias)
        ln.graft(model, "registers", registers)
        ln.graft(model, "prompts", prompts)
        if order == "tokens first":
            ln.graft(model, "relative", bias)
        torch.testing.assert_close(model(x), wanted)


def test_a_bias_joins_a_mask_that_is_there():
    model = of_timm(img_size=64)
    x, bias = torch.randn(2, 3, 64, 64), ln.nn.RelativeBias(4, 3, prefix=1, init=STRONG)
    keep = torch.ones(2, 1, 17, 17, dtype=torch.bool)
    keep[..., 9:] = False
    added = torch.zeros(keep.shape).masked_fill(~keep, float("-inf"))
    with torch.no_grad():
        wanted = model(x, attn_mask=added + bias.bias())
        ln.graft(model, "relative", bias)
        torch.testing.assert_close(model(x, attn_mask=keep), wanted)
        torch.testing.assert_close(model(x, attn_mask=added), wanted)


def test_a_bias_of_another_window_or_prefix_tells_both_numbers():
    model = of_timm(img_size=64)
    with pytest.raises(ShapeError, match=r"prefix=0[\s\S]*prefix=1"):
        ln.graft(model, "relative", ln.nn.RelativeBias(4, 3))
    ln.graft(model, "relative", ln.nn.RelativeBias(3, 3, prefix=1))
    with pytest.raises(ShapeError, match=r"10 tokens[\s\S]*17 tokens"):
        model(torch.randn(2, 3, 64, 64))


def test_two_class_tokens_stay_in_front():
    model = of_timm("deit_tiny_distilled_patch16_224", img_size=32)
    torch.nn.init.normal_(model.head_dist.weight)
    x, prompts = torch.randn(2, 3, 32, 32), ln.nn.Prompts(4, 48, prefix=2, init=STRONG)
    with torch.no_grad():
        tokens = prompts(embedded(model, x))
        for block in model.blocks:
            tokens = block(tokens)
        wanted = answer(model, torch.cat([tokens[:, :2], tokens[:, 6:]], dim=1))
        ln.graft(model, "prompts", prompts)
        torch.testing.assert_close(model(x), wanted)


def test_one_of_two_models_in_one_has_to_be_named():
    model = torch.nn.ModuleList([of_timm(img_size=32), of_timm(img_size=32)])
    with pytest.raises(LearnablesError, match=r"'0.blocks', '1.blocks'"):
        ln.graft(model, "prompts", ln.nn.Prompts(4, 48))
    handle = ln.graft(model, "prompts", ln.nn.Prompts(4, 48), "1.blocks.*")
    assert handle.at == ("1.blocks.0", "1.blocks.1", "1.blocks.2")


def test_a_delta_on_the_queries_and_values_of_a_fused_qkv_is_two_of_separate_ones():
    model, x = of_timm(img_size=32), torch.randn(2, 3, 32, 32)
    delta = ln.nn.LowRankDelta(144, 48, rank=2, sections=3, chosen=(0, 2))
    torch.nn.init.normal_(delta.up)
    with torch.no_grad():
        qkv = model.blocks[0].attn.qkv.weight
        query, value = delta.up[:48] @ delta.down[:2], delta.up[48:] @ delta.down[2:]
        changed = qkv + torch.cat([query, torch.zeros(48, 48), value])
        wanted = torch.func.functional_call(model, {"blocks.0.attn.qkv.weight": changed}, (x,))
        handle = ln.graft(model, "delta", delta, "blocks.0.attn.qkv.weight")
        torch.testing.assert_close(model(x), wanted)
        out = model(x)
        handle.merge()
        assert torch.equal(model(x), out)


def test_a_low_rank_bias_in_windows():
    import timm

    torch.manual_seed(0)
    stages = {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **stages).eval()
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    table, x = model.get_parameter(name), torch.randn(2, 3, 56, 56)
    delta = ln.nn.LowRankDelta(*table.shape, rank=1)
    torch.nn.init.normal_(delta.up, std=10.0)
    with torch.no_grad():
        changed = {name: table + delta.up @ delta.down}
        wanted = torch.func.functional_call(model, changed, (x,))
        ln.graft(model, "delta", delta, name)
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    "name", ["levit_128s", "tiny_vit_5m_224", "efficientformer_l1", "efficientvit_m0"]
)
def test_a_delta_on_biases_that_timm_keeps_in_evaluation_mode_is_the_one_of_now(name):
    import timm

    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=5), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for p in model.parameters():  # LeViT begins with attention that is multiplied by zero
            p.add_(0.1 * torch.randn_like(p))
    model.eval()
    biases = next(n for n, _ in model.named_parameters() if n.endswith("attention_biases"))
    ln.freeze(model)
    with torch.no_grad():
        before = model(x)  # timm keeps what it has made of the biases
    param = model.get_parameter(biases)
    delta = ln.nn.LowRankDelta(*param.shape, rank=1)
    handle = ln.graft(model, "delta", delta, biases)
    assert torch.equal(model(x), before)
    for step in range(2):  # trained in evaluation mode, as a frozen backbone is
        with torch.no_grad():
            torch.nn.init.normal_(delta.up, std=10.0 * (step + 1))
        delta.up.grad = None
        model(x).square().sum().backward()
        assert delta.up.grad.any()
    out = model(x)
    assert not torch.equal(out, before)
    with torch.no_grad():  # slow twin: a model whose parameter is another one
        twin = copy.deepcopy(model)
        for handle_of_twin in reversed([*grafts_of(twin)]):
            handle_of_twin.remove()
        twin.get_parameter(biases).add_(delta.up @ delta.down)
        torch.testing.assert_close(twin(x), out)
    handle.remove()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_timms_checkpointing_changes_no_gradient(name):
    grads = []
    for again in (False, True):
        model = of_timm(name, img_size=56 if "eva" in name else 64).train()
        model.set_grad_checkpointing(again)
        torch.manual_seed(1)
        ln.graft(model, "prompts", ln.nn.DeepPrompts(3, 4, 48, prefix=1, init=STRONG))
        ln.graft(model, "relative", ln.nn.RelativeBias(4, 3, prefix=1, init=STRONG))
        ln.graft(model, "scale", ln.nn.LayerScale(48, 0.5), "blocks.1")
        qkv = "blocks.0.attn.qkv.weight"
        ln.graft(model, "delta", ln.nn.LowRankDelta(*model.get_parameter(qkv).shape), qkv)
        torch.nn.init.normal_(model.delta.up)
        x = torch.randn(2, 3, *(model.patch_embed.img_size))
        model(x).square().sum().backward()
        fronts = ("prompts.", "relative.", "scale.", "delta.")
        grads.append({n: p.grad for n, p in model.named_parameters() if n.startswith(fronts)})
    assert len(grads[0]) == 5
    assert all(grad.any() for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1])


def of_two(name):
    """A model that sees and reads; of both parts only the one that sees is of a known family."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")
    made = config(text_config={**READS, **ENDS}, vision_config=SEES, projection_dim=16)
    return getattr(transformers, f"{name}Model")(made).eval()


@pytest.mark.parametrize(("name", "prefix"), [("CLIP", 1), ("Siglip", 0)])
def test_of_a_model_that_sees_and_reads_the_part_that_sees_is_found(name, prefix):
    model, x = of_two(name), torch.randn(2, 3, 32, 32)
    ids = torch.randint(3, 64, (2, 7))
    ids[:, -1] = 2
    prompts = ln.nn.Prompts(4, 48, prefix=prefix, init=STRONG)
    with torch.no_grad():
        plain = model(ids, x)
        vision = model.vision_model
        tokens = vision.embeddings(x)
        tokens = prompts(vision.pre_layrnorm(tokens) if name == "CLIP" else tokens)
        for layer in vision.encoder.layers:
            out = layer(tokens, attention_mask=None)
            tokens = out[0] if isinstance(out, tuple) else out
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix + 4 :]], dim=1)
        tokens = tokens if name == "CLIP" else vision.post_layernorm(tokens)
        handle = ln.graft(model, "prompts", prompts)
        assert handle.at == ("vision_model.encoder.layers.0", "vision_model.encoder.layers.1")
        ours = model(ids, x)
        torch.testing.assert_close(ours.vision_model_output.last_hidden_state, tokens)
        assert torch.equal(ours.text_embeds, plain.text_embeds)
        assert not torch.equal(ours.logits_per_image, plain.logits_per_image)
        handle.remove()
        assert torch.equal(model(ids, x).logits_per_image, plain.logits_per_image)


def test_registers_of_dinov2_are_counted_among_the_tokens_in_front():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SEES, num_register_tokens=2)
    model, x = Dinov2WithRegistersModel(config).eval(), torch.randn(2, 3, 32, 32)
    bias, prompts = (
        ln.nn.RelativeBias(4, 3, prefix=3, init=STRONG),
        ln.nn.Prompts(4, 48, prefix=3, init=STRONG),
    )
    with pytest.raises(ShapeError, match=r"prefix=1[\s\S]*prefix=3"):
        ln.graft(model, "relative", ln.nn.RelativeBias(4, 3, prefix=1))
    old = torch.tensor([0, 1, 2, *range(7, 23)])  # among them stand the prompts
    padded = torch.zeros(3, 23, 23)
    padded[:, old[:, None], old] = bias.bias().detach()

    def told(module, args, kwargs):
        return args, {**kwargs, "attention_mask": padded[None]}

    with torch.no_grad():
        tokens = prompts(model.embeddings(x))
        for layer in model.encoder.layer:
            handle = layer.attention.register_forward_pre_hook(told, with_kwargs=True)
            tokens = layer(tokens)
            handle.remove()
        wanted = model.layernorm(tokens[:, old])
        ln.graft(model, "relative", bias)
        ln.graft(model, "prompts", prompts)
        torch.testing.assert_close(model(x).last_hidden_state, wanted)
        assert wanted.shape == (2, 19, 48)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_width_that_does_not_fit_a_known_model_is_told_before_it_is_touched(name):
    model = of_timm(name, img_size=32)
    names = list(model.state_dict())
    with pytest.raises(ShapeError, match=r"\(1, 4, 64\)[\s\S]*\(B, N, 48\)"):
        ln.graft(model, "prompts", ln.nn.Prompts(4, 64))
    assert list(model.state_dict()) == names
    assert not grafts_of(model)
    ln.graft(model, "scale", ln.nn.LayerScale(64), "blocks.1")
    with pytest.raises(ShapeError, match=r"gamma \(64,\)[\s\S]*48\)"):
        model(torch.randn(2, 3, 32, 32))


def test_the_counters_of_rotary_positions_count_grafts_in_and_out():
    model = of_timm("eva02_tiny_patch14_224", img_size=56)
    x = torch.randn(2, 3, 56, 56)
    before = [block.attn.num_prefix_tokens for block in model.blocks]
    with torch.no_grad():
        plain = model(x)
        first = ln.graft(model, "registers", ln.nn.RegisterTokens(2, 48, init=STRONG))
        second = ln.graft(model, "prompts", ln.nn.Prompts(3, 48, prefix=3, init=STRONG))
        assert [block.attn.num_prefix_tokens for block in model.blocks] == [n + 5 for n in before]
        other = copy.deepcopy(model)
        for handle in reversed([*grafts_of(other)]):
            handle.remove()
        assert torch.equal(other(x), plain)
        assert [block.attn.num_prefix_tokens for block in model.blocks] == [n + 5 for n in before]
        second.remove()
        first.remove()
        assert [block.attn.num_prefix_tokens for block in model.blocks] == before
        assert torch.equal(model(x), plain)


def test_attention_by_another_name_makes_no_convolutional_network_of_a_model():
    import timm

    model, x = timm.create_model("cait_xxs24_224", img_size=32).eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(LearnablesError, match="no family of models knows") as error:
        ln.graft(model, "prompts", ln.nn.Prompts(4, 192))
    path = eval(error.value.mend.removeprefix("at="))
    with torch.no_grad():
        for block in model.modules():  # they begin with scales of nearly nothing
            if hasattr(block, "gamma_1"):
                block.gamma_1.fill_(1.0), block.gamma_2.fill_(1.0)
        plain = model(x)
        handle = ln.graft(model, "prompts", ln.nn.Prompts(4, 192, init=STRONG), at=path)
        assert not torch.equal(model(x), plain)
        handle.remove()
        assert torch.equal(model(x), plain)
