"""BERT, RoBERTa and XLM-RoBERTa."""
