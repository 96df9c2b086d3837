"""Attacks as functions of models and tensors. They know no recipe's file, no run and no experiment."""
