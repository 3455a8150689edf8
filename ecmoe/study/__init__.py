"""Which runs a page rests on, and what follows from them.

plan: names and YAML -> runs and measurements. engine: carries them out. load, table: what is there. estimate, protocol,
verdict: what it says of a claim; answer: of all claims, in three sentences. cost, speed: what it takes.
"""
