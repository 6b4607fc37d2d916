"""All tables of a study, in the order in which they are read."""

from expertgrid.ablations.records.directory import StudyDirectory
from expertgrid.ablations.results.evidence import Evidence
from expertgrid.ablations.results.tables.cells import cell_table
from expertgrid.ablations.results.tables.effects import contrast_table, factor_table, interaction_table
from expertgrid.model.system.text import Table


def study_tables(directory: StudyDirectory, evidence: Evidence) -> list[Table]:
    """What each factor does, interactions that are decided, declared contrasts, cells."""
    tables = [factor_table(evidence)] if evidence.effects else []
    tables += [interaction_table(evidence)] if evidence.decided_interactions else []
    tables += [contrast_table(evidence)] if evidence.declared else []
    return [*tables, cell_table(directory, evidence)]
