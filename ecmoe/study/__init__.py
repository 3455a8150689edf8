"""The study: plan the runs behind each page, carry them out, and judge the paper's claims from their results.

An arm is a named configuration that is trained with several seeds. plan: YAML -> runs and measurements. engine: runs the plan.
load, table, continual: read the results. units, protocol, evidence, estimate, verdict: judge a claim; repeats: link
versions of the code; answer: summarise all claims. cost, speed: time and FLOPs. parameters, progress: of a notebook.
"""
