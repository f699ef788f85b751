"""Tokens in text models: what is masked stays masked, positions and the cache count what they do.

Each fast way has a slow twin: the same vectors handed over by hand, or the whole text read again.
"""

import copy
import pickle

import pytest
import torch
from tests.integrations.grafts import DISTIL, GPT2, NONE, READS, SMALL

import learnables as ln
from learnables.errors import LearnablesError

ENCODERS = {
    "Bert": {},
    "Roberta": {},
    "XLMRoberta": {},
    "Electra": {"embedding_size": 48},
    "DistilBert": DISTIL,
}
DECODERS = {
    "Llama": {"num_key_value_heads": 1},
    "Mistral": {"num_key_value_heads": 1},
    "Mixtral": {"num_key_value_heads": 1, "num_local_experts": 2},
    "Gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "Phi3": {"num_key_value_heads": 1},
    "SmolLM3": {"num_key_value_heads": 1},
    "Qwen2": {"num_key_value_heads": 1},
    "Qwen3": {"num_key_value_heads": 3, "head_dim": 16},
    "Olmo": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "GPT2": GPT2,
}
FRONTS = ("prompts.", "deep.", "delta.")
STRONG = ln.init.normal(1.0)  # prompts that a trained model would have are as large as its tokens


def encoder(name, attention="sdpa"):
    import transformers

    torch.manual_seed(0)
    config = {**READS, **(ENCODERS[name] if name == "DistilBert" else {**SMALL, **ENCODERS[name]})}
    made = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}Model")(made).eval()
    model.set_attn_implementation(attention)
    return model


def decoder(name, attention="sdpa"):
    import transformers

    torch.manual_seed(0)
    own = {} if name == "GPT2" else {**SMALL, **READS}
    made = getattr(transformers, f"{name}Config")(**{**own, **DECODERS[name], **NONE})
    kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(transformers, kind)(made).eval()
    model.set_attn_implementation(attention)
    return model


def padded_right():
    ids = torch.randint(1, 64, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids * mask, mask


def padded_left():
    ids, mask = padded_right()
    return ids.flip(1), mask.flip(1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("kind", ["Prompts", "DeepPrompts"])
def test_padding_changes_nothing_of_a_text_with_prompts(name, kind, attention):
    model = encoder(name, attention)
    ids, mask = padded_right()
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).last_hidden_state
        prompts = (
            ln.nn.Prompts(3, 48, prefix=1, init=STRONG)
            if kind == "Prompts"
            else ln.nn.DeepPrompts(2, 3, 48, prefix=1, init=STRONG)
        )
        handle = ln.graft(model, "prompts", prompts)
        padded = model(ids, attention_mask=mask).last_hidden_state
        alone = model(ids[1:, :4]).last_hidden_state
        assert padded.shape == plain.shape
        assert (padded - plain).abs().max() > 1e-3
        torch.testing.assert_close(padded[1:, :4], alone)
        handle.remove()
        assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, plain)


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_of_an_encoder_are_those_of_the_text(name):
    model, (ids, mask) = encoder(name), padded_right()
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        ln.graft(model, "prompts", ln.nn.DeepPrompts(2, 3, 48, prefix=1, init=STRONG))
        out = model(ids, attention_mask=mask, output_hidden_states=True)
        alone = model(ids[1:, :4], output_hidden_states=True).hidden_states
        assert [state.shape for state in out.hidden_states] == [state.shape for state in plain]
        assert torch.equal(out.hidden_states[0], plain[0])
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert (out.hidden_states[1] - plain[1]).abs().max() > 1e-3
        for padded, short in zip(out.hidden_states, alone, strict=True):
            torch.testing.assert_close(padded[1:, :4], short)


def test_a_graft_in_an_encoder_is_what_a_hand_written_one_computes():
    model = encoder("Bert", "eager")
    ids, mask = padded_right()
    prompts = ln.nn.Prompts(3, 48, prefix=1, init=STRONG)
    with torch.no_grad():
        x = prompts(model.embeddings(ids))
        seen = torch.cat([mask[:, :1], mask.new_ones(2, 3), mask[:, 1:]], dim=1)
        logits = torch.zeros(2, 1, 10, 10).masked_fill(seen[:, None, None] == 0, -1e30)
        for layer in model.encoder.layer:
            out = layer(x, logits)
            x = out[0] if isinstance(out, tuple) else out
        ln.graft(model, "prompts", prompts)
        ours = model(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(ours, torch.cat([x[:, :1], x[:, 4:]], dim=1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_graft_in_a_decoder_is_its_vectors_in_front(name, attention):
    model = decoder(name, attention)
    ids, mask = padded_left()
    prompts = ln.nn.Prompts(3, 48, init=STRONG)
    with torch.no_grad():
        embedded = prompts(model.get_input_embeddings()(ids))
        whole = torch.cat([mask.new_ones(2, 3), mask], dim=1)
        wanted = model(inputs_embeds=embedded, attention_mask=whole).logits[:, 3:]
        ln.graft(model, "prompts", prompts)
        ours = model(ids, attention_mask=mask)
        torch.testing.assert_close(ours.logits, wanted)
        positions = torch.arange(7).expand(2, -1)
        placed = model(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(placed, wanted)
        loss = model(ids, attention_mask=mask, labels=ids).loss
        assert torch.isfinite(loss)
        states = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        assert {tuple(state.shape) for state in states} == {(2, 7, 48)}


@pytest.mark.parametrize("kind", ["Prompts", "DeepPrompts", "two"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_is_generation_without(name, kind):
    model = decoder(name)
    ids, mask = padded_left()
    if kind == "DeepPrompts":
        ln.graft(model, "deep", ln.nn.DeepPrompts(2, 3, 48, init=STRONG))
    else:
        ln.graft(model, "prompts", ln.nn.Prompts(3, 48, init=STRONG))
    if kind == "two":
        ln.graft(model, "memory", ln.nn.MemoryTokens(2, 48, init=STRONG))
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    told |= {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        cached = model.generate(ids, use_cache=True, **told)
        again = model.generate(ids, use_cache=False, **told)
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(cached.logits, again.logits)
    put = 5 if kind == "two" else 3
    assert cached.past_key_values.get_seq_length() == 7 + put + 5


@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_that_of_the_same_vectors_handed_over(name):
    model = decoder(name)
    ids, mask = padded_left()
    prompts = ln.nn.Prompts(3, 48, init=STRONG)
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    told |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        embedded = prompts(model.get_input_embeddings()(ids))
        whole = torch.cat([mask.new_ones(2, 3), mask], dim=1)
        wanted = model.generate(inputs_embeds=embedded, attention_mask=whole, **told)
        ln.graft(model, "prompts", prompts)
        ours = model.generate(ids, attention_mask=mask, **told)
    assert torch.equal(ours.sequences[:, 7:], wanted.sequences)
    torch.testing.assert_close(ours.logits, wanted.logits)


OPT = {"ffn_dim": 96, "word_embed_proj_dim": 48}
BLOOM = {"hidden_size": 48, "n_layer": 2, "n_head": 3, "vocab_size": 64, "pad_token_id": 0}
GPTJ = {**GPT2, "rotary_dim": 8, "pad_token_id": 0}
STRANGERS = {  # decoders that no family knows
    "OPT": {**SMALL, **READS, **OPT},
    "Bloom": BLOOM,
    "GPTJ": GPTJ,
    "StableLm": {**SMALL, **READS, "num_key_value_heads": 3},
    "Granite": {**SMALL, **READS},
    "Cohere": {**SMALL, **READS, "num_key_value_heads": 1},
}


def stranger(name):
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**{**STRANGERS[name], **NONE})
    model = getattr(transformers, f"{name}ForCausalLM")(made).eval()
    with torch.no_grad():
        for param in model.parameters():  # so that no two words are alike likely
            param.add_(torch.randn_like(param) / 10)
    return model


@pytest.mark.parametrize("kind", ["Prompts", "DeepPrompts"])
@pytest.mark.parametrize("name", STRANGERS)
def test_in_a_decoder_that_no_family_knows_the_path_that_is_offered_is_enough(name, kind):
    model, (ids, mask) = stranger(name), padded_left()
    made = {
        "Prompts": ln.nn.Prompts(3, 48, init=STRONG),
        "DeepPrompts": ln.nn.DeepPrompts(2, 3, 48, init=STRONG),
    }
    with pytest.raises(LearnablesError, match="no family of models knows") as error:
        ln.graft(model, "prompts", made[kind])
    path = eval(error.value.mend.removeprefix("at="))
    told = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    told |= {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        handle = ln.graft(model, "prompts", made[kind], at=path)
        cached = model.generate(ids, use_cache=True, **told)
        again = model.generate(ids, use_cache=False, **told)
        assert torch.equal(cached.sequences, again.sequences)
        torch.testing.assert_close(cached.logits, again.logits)
        assert cached.past_key_values.get_seq_length() == 7 + 3 + 4
        if kind == "Prompts":
            vectors = made[kind](model.get_input_embeddings()(ids))
            whole = torch.cat([mask.new_ones(2, 3), mask], dim=1)
            handle.remove()
            wanted = model(inputs_embeds=vectors, attention_mask=whole).logits[:, 3:]
            handle = ln.graft(model, "prompts", made[kind], at=path)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted)
        assert not torch.equal(model(ids, attention_mask=mask).logits, plain)
        handle.remove()
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)


def test_in_the_encoder_of_an_encoder_and_decoder_too():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 48, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 3}
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).eval()
    ids, mask = padded_right()
    prompts = ln.nn.Prompts(3, 48, init=STRONG)
    with torch.no_grad():
        vectors = prompts(model.get_input_embeddings()(ids))
        whole = torch.cat([mask.new_ones(2, 3), mask], dim=1)
        wanted = model.encoder(inputs_embeds=vectors, attention_mask=whole).last_hidden_state
        ln.graft(model, "prompts", prompts, at="encoder.block.*")
        ours = model.encoder(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(ours, wanted[:, 3:])
        assert model(ids, attention_mask=mask, decoder_input_ids=ids).logits.shape == (2, 7, 64)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_cache_that_is_handed_over_leaves_no_ids_out(name, masked):
    model, ids = decoder(name), torch.randint(1, 64, (1, 7))
    ln.graft(model, "prompts", ln.nn.Prompts(3, 48, init=STRONG))
    more = torch.randint(1, 64, (1, 12))
    more[:, :7] = ids

    def mask(x):
        return {"attention_mask": torch.ones_like(x)} if masked else {}

    with torch.no_grad():
        first = model(ids, use_cache=True, **mask(ids)).past_key_values
        wanted = model(more).logits[:, 7:]
        new = model(more[:, 7:], past_key_values=first, **mask(more)).logits
        torch.testing.assert_close(new, wanted)
        first = model(ids, use_cache=True, **mask(ids)).past_key_values
        with pytest.raises(LearnablesError, match=r"12 ids, 9 of them"):
            model.generate(more, past_key_values=first, max_new_tokens=2, **mask(more))


def test_prompts_of_a_decoder_see_no_future():
    model = decoder("Llama", "eager")
    ln.graft(model, "deep", ln.nn.DeepPrompts(2, 3, 48, init=STRONG))
    ids = torch.randint(1, 64, (1, 7))
    other = ids.clone()
    other[0, 4:] = (other[0, 4:] + 7) % 63 + 1
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :4], model(other).logits[:, :4])


def test_what_a_decoder_cannot_count_is_refused():
    from transformers import StaticCache

    model = decoder("GPT2")
    ln.graft(model, "prompts", ln.nn.Prompts(3, 48))
    ids = torch.randint(1, 64, (2, 7))
    with pytest.raises(LearnablesError, match=r"attention_mask \(2, 1, 7, 7\)"):
        model(ids, attention_mask=torch.ones(2, 1, 7, 7))
    with pytest.raises(LearnablesError, match="token_type_ids"):
        model(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(LearnablesError, match="packed"):
        model(ids[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
    behind = decoder("GPT2")
    ln.graft(behind, "prompts", ln.nn.Prompts(3, 48, prefix=1))
    left_ids, left = padded_left()
    with pytest.raises(LearnablesError, match="padding within the first 1 ids"):
        behind(left_ids, attention_mask=left)
    cache = StaticCache(model.config, max_cache_len=32)
    with pytest.raises(LearnablesError, match="DynamicCache"):
        model(ids, past_key_values=cache)
    with pytest.raises(LearnablesError, match="causal attention"):
        ln.graft(model, "bias", ln.nn.RelativeBias((1, 7), 3), at="transformer.h.0.attn")
    with pytest.raises(LearnablesError, match="in front of all layers"):
        ln.graft(model, "more", ln.nn.Prompts(3, 48), at="transformer.h.1")


def test_gradient_checkpointing_changes_no_gradient():
    grads = []
    for again in (False, True):
        model = decoder("Llama").train()
        torch.manual_seed(1)
        ln.graft(model, "prompts", ln.nn.Prompts(3, 48))
        ln.graft(model, "deep", ln.nn.DeepPrompts(2, 2, 48, prefix=3))
        query = "model.layers.0.self_attn.q_proj.weight"
        ln.graft(model, "delta", ln.nn.LowRankDelta(48, 48, init=STRONG), query)
        torch.nn.init.normal_(model.delta.up)
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = padded_left()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if n.startswith(FRONTS)})
    assert all(grad.any() for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1])


def test_a_graft_around_peft_is_a_graft_without_it():
    import peft

    ids, mask = padded_left()
    prompts = ln.nn.Prompts(3, 48, init=STRONG)
    bare = decoder("Llama")
    wrapped = peft.get_peft_model(decoder("Llama"), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (bare, wrapped):
        ln.graft(model, "prompts", prompts)
    with torch.no_grad():
        wanted = bare(ids, attention_mask=mask).logits
        assert torch.equal(wrapped(ids, attention_mask=mask).logits, wanted)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_delta_on_a_bank_of_experts_is_a_delta_for_each(name):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, **READS, **NONE, num_key_value_heads=1, num_local_experts=4)
    model, ids = MixtralForCausalLM(config).eval(), torch.randint(1, 64, (2, 7))
    at = f"model.layers.0.mlp.experts.{name}"
    bank = model.get_parameter(at)
    delta = ln.nn.LowRankDelta(*bank.shape, rank=2)
    torch.nn.init.normal_(delta.up)
    with torch.no_grad():
        plain = model(ids).logits
        each = zip(bank, delta.up, delta.down, strict=True)
        changed = torch.stack([w + up @ down for w, up, down in each])
        wanted = torch.func.functional_call(model, {at: changed}, (ids,)).logits
        handle = ln.graft(model, "delta", delta, at)
        out = model(ids).logits
        torch.testing.assert_close(out, wanted)
        assert (out - plain).abs().max() > 1e-4
        handle.merge()
        assert torch.equal(model(ids).logits, out)


@pytest.mark.parametrize("carried", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", ["Prompts", "DeepPrompts"])
def test_a_copy_of_a_decoder_generates_alike_and_is_independent(kind, carried):
    model = decoder("Llama")
    made = {"Prompts": ln.nn.Prompts(3, 48), "DeepPrompts": ln.nn.DeepPrompts(2, 3, 48)}
    ln.graft(model, "prompts", made[kind])
    other = carried(model)
    ids, mask = padded_left()
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with torch.no_grad():
        assert torch.equal(other.generate(ids, **told), model.generate(ids, **told))
        out = model(ids).logits
        assert torch.equal(other(ids).logits, out)
        other.prompts.tokens.add_(1.0)
        assert not torch.equal(other(ids).logits, out)
        assert torch.equal(model(ids).logits, out)


@pytest.mark.parametrize("name", ["Bert", "Llama"])
def test_an_exported_text_model_keeps_its_graft(name):
    model = encoder(name) if name in ENCODERS else decoder(name)
    model.config.use_cache = False
    ln.graft(model, "prompts", ln.nn.Prompts(3, 48, init=STRONG))
    ids = torch.randint(1, 64, (2, 7))
    exported = torch.export.export(model, (ids,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(ids)[0], model(ids)[0])
