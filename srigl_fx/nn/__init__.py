"""The mask-managed layer types: what a module becomes once it owns a masked weight."""
