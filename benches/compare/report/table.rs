//! Text tables: aligned for a terminal, or Markdown.

use std::iter;

/// The format of a table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Markdown,
}

/// A header, and rows of equal length.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Style {
    pub(super) fn heading(self, level: usize, text: &str) -> String {
        match self {
            Self::Plain => format!("\n{text}\n\n"),
            Self::Markdown => format!("\n{} {text}\n\n", "#".repeat(level)),
        }
    }
}

impl Table {
    pub(super) fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(ToString::to_string).collect()] }
    }

    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let row: Vec<String> = cells.into_iter().collect();
        debug_assert_eq!(row.len(), self.rows[0].len());
        self.rows.push(row);
    }

    pub(super) fn render(&self, style: Style) -> String {
        let widths: Vec<usize> = (0..self.rows[0].len())
            .map(|column| {
                self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
            })
            .collect();
        let line = |cells: &[String]| {
            let padded: Vec<String> = iter::zip(cells, &widths)
                .map(|(cell, &width)| {
                    format!("{}{}", cell, " ".repeat(width - cell.chars().count()))
                })
                .collect();
            match style {
                Style::Plain => padded.join("  ").trim_end().to_owned() + "\n",
                Style::Markdown => format!("| {} |\n", padded.join(" | ")),
            }
        };
        let rule: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
        let mut text = line(&self.rows[0]);
        text += &line(&rule);
        self.rows[1..].iter().for_each(|row| text += &line(row));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["a", "bb"]);
        table.row(["±1%".into(), "x".into()]);
        assert_eq!(table.render(Style::Plain), "a    bb\n---  --\n±1%  x\n");
        assert_eq!(table.render(Style::Markdown), "| a   | bb |\n| --- | -- |\n| ±1% | x  |\n");
    }
}
