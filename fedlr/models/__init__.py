"""Everything that touches PEFT and transformers: the base model, its adapter, precision, prefix, export."""
