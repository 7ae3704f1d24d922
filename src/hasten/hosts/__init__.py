"""Hosts: each ties the engine to one framework. They import the engine and their framework, never each other."""
