"""Adapters: small matrices that learn beside a frozen base, the base in a smaller type, and the files that they leave."""
