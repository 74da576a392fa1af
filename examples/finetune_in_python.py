"""Fine-tune a checkpoint in Python: the steps of `peft-jax demo`, each a public call.

    python examples/finetune_in_python.py --output my-adapter

Loads the small Llama that ships with the package with an int8 base, trains a LoRA adapter on the instructions beside
it, and writes the adapter in PEFT's format and the merged checkpoint in Hugging Face's. Put your own folder and file
in place of MODEL and TRAIN.
"""

from pathlib import Path

import jax
import optax
import tyro
from transformers import AutoTokenizer

import peft_jax as pj
from peft_jax import train as pt
from peft_jax.cli.demo_data import HELD_OUT, MODEL, TRAIN
from peft_jax.models import LazyLogits

LENGTH = 96  # tokens of an example


def main(
    output: Path = Path("my-adapter"), steps: int = 300, batch_size: int = 16, learning_rate: float = 2e-3
) -> None:
    """Run all steps."""
    # The data: prompts are masked out of the loss, every example has one length.
    tokenizer = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)
    records = pt.read_records(HELD_OUT)
    examples, too_long = pt.encode(pt.read_records(TRAIN), tokenizer, cutoff_len=LENGTH)
    held_out_examples, held_out_too_long = pt.encode(records, tokenizer, cutoff_len=LENGTH)
    print(f"{too_long + held_out_too_long} examples are longer than {LENGTH} tokens and left out")
    data = pt.Padded(examples, LENGTH, shortest=LENGTH)
    held_out = pt.Padded(held_out_examples, LENGTH, shortest=LENGTH)

    # The model: weights in int8, a LoRA adapter on every matmul of the layers.
    base = pj.AutoModelForCausalLM.from_pretrained(MODEL, load_in_8bit=True)
    config = pj.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = pj.get_peft_model(base, config, key=jax.random.key(0))
    model.print_trainable_parameters()

    # The compiled steps, and any optax optimizer. Lazy logits are computed by the loss, and never all held in memory.
    def apply(model: pj.PeftModel, input_ids: jax.Array, attention_mask: jax.Array) -> LazyLogits:
        return model(input_ids, attention_mask=attention_mask, lazy_logits=True).logits

    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=0.0)
    step = pt.make_training_step(apply, optimizer)
    evaluation_step = pt.make_evaluation_step(apply)

    # The loop: only the trainable partition has gradients and optimizer state.
    trainable, frozen = pj.partition(model)
    opt_state = optimizer.init(trainable)
    batches = pt.training_batches(data, batch_size, seed=0)
    curve = []
    for number in range(steps):
        key = jax.random.fold_in(jax.random.key(0), number)  # for dropout
        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batches[number], key)
        pt.check_finite(metrics, number + 1, trainable, opt_state)
        curve.append((number + 1, float(metrics.loss)))
    model = pj.combine(trainable, frozen)
    held_out_loss = pt.evaluate(evaluation_step, model, pt.evaluation_batches(held_out, batch_size))
    print(f"training loss {curve[0][1]:.3f} -> {curve[-1][1]:.3f}, held-out loss {held_out_loss:.3f}")

    # A generation, greedy.
    input_ids, attention_mask = pt.tokenize_prompts(records[:1], tokenizer)
    whole = model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=24)
    answer = tokenizer.decode(whole[0, input_ids.shape[1] :].tolist(), skip_special_tokens=True)
    print(f"{records[0].instruction} {records[0].input} -> {answer}")

    # To PyTorch: the adapter for PEFT, the merged checkpoint for transformers.
    model.save_pretrained(output / "adapter")
    full = pj.AutoModelForCausalLM.from_pretrained(MODEL)  # merge into the float weights, not into the rounded ones
    pj.PeftModel.from_pretrained(full, output / "adapter").merge_and_unload().save_pretrained(output / "merged")
    pt.plot_losses(output / "loss.png", {"training": curve}, title="LoRA on an int8 Llama")


if __name__ == "__main__":
    tyro.cli(main)
