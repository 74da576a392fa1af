"""Qwen's mixtures of experts: Qwen2-MoE and Qwen3-MoE."""
