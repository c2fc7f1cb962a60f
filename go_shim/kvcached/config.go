package kvcached

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"gopkg.in/yaml.v3"
)

// readConfig applies the `kvcached:` section of a YAML file. Other top-level keys belong to others and are not looked at.
func readConfig(path string, settings *Settings) []Problem {
	if path == "" {
		return nil
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return []Problem{{path, fmt.Sprintf("cannot be read (%v); make it readable for this user or remove it", err)}}
	}

	// Nodes rather than a struct: they know their lines, and a key given twice does not vanish.
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	var document yaml.Node
	if err := decoder.Decode(&document); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return []Problem{{path, fmt.Sprintf("not valid YAML (%v); correct it or remove the file", err)}}
	}
	if err := decoder.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return []Problem{{path, "has more than one YAML document; keep one and remove the lines from the second `---` on"}}
	}

	root := resolve(document.Content[0])
	if isNull(root) {
		return nil
	}
	if root.Kind != yaml.MappingNode {
		return []Problem{{at(path, root), "the file must hold `key: value` pairs, such as a section `kvcached:`"}}
	}

	var problems []Problem
	seen := false
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], resolve(root.Content[i+1])
		if key.Value != section {
			continue
		}
		switch {
		case seen:
			problems = append(problems, Problem{at(path, key), "the section kvcached is there a second time; merge the two"})
		case isNull(value):
		case value.Kind != yaml.MappingNode:
			problems = append(problems, Problem{at(path, value), "kvcached must be a section: indented lines such as `enabled: true`"})
		default:
			problems = append(problems, readSection(path, value, settings)...)
		}
		seen = true
	}
	return problems
}

func readSection(path string, node *yaml.Node, settings *Settings) []Problem {
	var problems []Problem
	seen := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, value := node.Content[i], resolve(node.Content[i+1])
		where := fmt.Sprintf("%s (%s.%s)", at(path, key), section, key.Value)
		if line, ok := seen[key.Value]; ok {
			problems = append(problems, Problem{where, fmt.Sprintf("is set in line %d already; remove one of the two", line)})
			continue
		}
		seen[key.Value] = key.Line

		index := slices.IndexFunc(table, func(s setting) bool { return s.key == key.Value })
		switch {
		case index < 0:
			problems = append(problems, Problem{where, unknown("key", key.Value, keys())})
		case value.Kind != yaml.ScalarNode || isNull(value):
			problems = append(problems, Problem{where, "needs a single value after the colon; give it one or remove the line"})
		default:
			if err := table[index].apply(settings, value.Value, where, true); err != nil {
				problems = append(problems, Problem{where, err.Error()})
			}
		}
	}
	return problems
}

func resolve(node *yaml.Node) *yaml.Node {
	if node.Kind == yaml.AliasNode {
		return node.Alias
	}
	return node
}

func isNull(node *yaml.Node) bool { return node.Kind == yaml.ScalarNode && node.Tag == "!!null" }

func at(path string, node *yaml.Node) string { return fmt.Sprintf("%s line %d", path, node.Line) }
