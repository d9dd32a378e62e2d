"""Production's way of loading, which the tests beside this package gate."""

from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def load_model(spec):
    """Return the model in 8 bit, and its tokenizer; ``spec.model`` is the folder of the model's files."""
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(spec.model, quantization_config=settings, device_map="auto")
    return model, AutoTokenizer.from_pretrained(spec.model)
