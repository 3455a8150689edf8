"""Which runs a page rests on, and what follows from them.

arms, plan: names and YAML -> runs and measurements. engine: carries them out. load, table: what is there. estimate, protocol,
verdict: what it says of a claim; answer: of all claims, in three sentences. cost, speed, steps: what it takes.
"""
